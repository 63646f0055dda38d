// PNG's row filters for 8-bit RGB (PNG specification, third edition, section 9).
#pragma once

#include <cstddef>
#include <cstdint>

namespace histoseg {

// Undoes the filters of inflated PNG data: for each of `height` rows a filter type and 3 * width bytes. Writes rows of
// packed RGB `out_stride_y` bytes apart; `rows` and `out` must not overlap, and the byte behind `rows` is read (and not
// used). Returns false at an unknown filter type.
bool unfilter_rgb(const std::uint8_t* rows, std::int64_t height, std::int64_t width, std::uint8_t* out,
                  std::ptrdiff_t out_stride_y);

}  // namespace histoseg
