// Class colours over an image: tinted areas with outlines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "labels_pixel.h"

namespace histoseg {

// A band of rows. Strides in bytes, any sign; pixels are packed within a row. `out` may be `rgb` itself.
struct TintBand {
    const std::uint8_t* rgb;  // (height, width, 3)
    std::ptrdiff_t rgb_stride_y;
    const std::uint8_t* ids;  // (height, width), each below the palette's size
    std::ptrdiff_t ids_stride_y;
    const std::uint8_t* above;  // (width): the ids of the row just above, so that outlines cross bands; may be null
    std::uint8_t* out;          // (height, width, 3)
    std::ptrdiff_t out_stride_y;
    std::int64_t height, width;
};

// Blends each pixel with its class colour, alpha of 255 parts, and draws a pixel whose id differs from its left or
// upper neighbour in the pure colour: its own, or where its own is class 0 (background), the neighbour's (left first).
// Class 0 is left untinted.
void tint(const TintBand& band, const PaletteTable& palette, std::uint8_t alpha);

}  // namespace histoseg
