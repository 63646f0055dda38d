// PNG's pixel chunks, and its row filters for 8-bit RGB (PNG specification, third edition, sections 5 and 9).
#pragma once

#include <cstddef>
#include <cstdint>

namespace histoseg {

// Undoes the filters of inflated PNG data: for each of `height` rows a filter type and 3 * width bytes. Writes rows of
// packed RGB `out_stride_y` bytes apart; `rows` and `out` must not overlap, and the byte behind `rows` is read (and not
// used). Returns false at an unknown filter type.
bool unfilter_rgb(const std::uint8_t* rows, std::int64_t height, std::int64_t width, std::uint8_t* out,
                  std::ptrdiff_t out_stride_y);

// Bytes in the IDAT chunks of a PNG file, the chunks in front of the first passed over from `start` on; they are joined in
// `out` unless it is null. -1 where the file ends before or within them.
std::int64_t join_pixel_chunks(const std::uint8_t* file, std::int64_t size, std::int64_t start, std::uint8_t* out);

}  // namespace histoseg
