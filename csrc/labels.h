// RGB label images to class ids and back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "labels_pixel.h"

namespace histoseg {

constexpr int kMaxOffenders = 16;

// An 8-bit image with any strides (in bytes, negative ones too). `channels` is read as R, G, B; more are ignored.
struct RgbView {
    const std::uint8_t* data;
    std::int64_t height, width;
    std::ptrdiff_t stride_y, stride_x, stride_c;
};

struct IdsView {
    const std::uint8_t* data;
    std::int64_t height, width;
    std::ptrdiff_t stride_y, stride_x;
};

// A pixel whose colour is farther from every palette colour than the tolerance.
struct Offender {
    std::int64_t y, x;
    std::uint8_t r, g, b;
};

struct DecodeReport {
    std::int64_t approximate = 0;  // pixels off the palette, but within the tolerance
    std::int64_t unmatched = 0;    // pixels farther off: their id is kUnmatched
    int offender_count = 0;
    std::array<Offender, kMaxOffenders> offenders{};  // the first unmatched ones in raster order
};

// An id that has no colour in the palette; y is -1 when there is none.
struct BadId {
    std::int64_t y = -1, x = -1;
    std::uint8_t value = 0;
};

// The largest squared distance d2 with sqrt(d2) <= tolerance (which is not negative and not NaN).
std::int32_t tolerance_to_distance2(double tolerance);

// ids: height x width, C-contiguous. threads: 0 chooses.
DecodeReport decode_labels(const RgbView& rgb, const PaletteTable& palette, std::int32_t max_distance2, int threads,
                           std::uint8_t* ids);

// rgb: height x width x 3, C-contiguous. Returns the first bad id in raster order; rgb then is only partly written.
BadId encode_labels(const IdsView& ids, const PaletteTable& palette, int threads, std::uint8_t* rgb);

// The first id in raster order that is not below `size`.
BadId find_bad_id(const IdsView& ids, std::int32_t size);

// The CUDA sibling (labels.cu). All pointers but the report's text are device memory; rgb is height x width x
// channels (3 or 4) with rows `stride_y` bytes apart, counters holds {approximate, unmatched} and is added to.
// Only queues work on `stream` (a cudaStream_t). Returns null, or CUDA's own words for what failed.
const char* launch_decode_labels(const std::uint8_t* rgb, std::int64_t height, std::int64_t width, int channels,
                                 std::ptrdiff_t stride_y, const PaletteTable& palette, std::int32_t max_distance2,
                                 std::uint8_t* ids, unsigned long long* counters, void* stream);

}  // namespace histoseg
