// The inner loops of labels.cpp: runs of packed RGB pixels, at the SIMD level in use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "labels_pixel.h"

namespace histoseg {

// Pixels of a run that has to be packed first: its RGB fits the L1 cache of any machine.
constexpr std::size_t kSpan = 4096;

// ids[i] = the palette id of the i-th packed RGB pixel if it is exactly a palette colour, else kUnmatched.
// Returns whether all of them are.
using DecodeSpan = bool (*)(const std::uint8_t* rgb, std::size_t count, const PaletteTable& palette, std::uint8_t* ids);

// The colour of each id, packed. Every id must be below the palette's size.
using EncodeSpan = void (*)(const std::uint8_t* ids, std::size_t count, const PaletteTable& palette, std::uint8_t* rgb);

DecodeSpan pick_decode_span();
EncodeSpan pick_encode_span();

}  // namespace histoseg
