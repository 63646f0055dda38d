// Logits of a tile to classes of the image: argmax, crop, paste and the sums behind shares and mean confidence.
#pragma once

#include <cstddef>
#include <cstdint>

#include "labels_pixel.h"
#include "stitch_pixel.h"

namespace histoseg {

// Logits (classes, height, width), float32; strides in bytes, any sign. With `phases` 1 rows are contiguous. With 2 they
// are as before a pixel shuffle: pixel (y, x) is in plane (y % 2, x % 2) at (y / 2, x / 2), with contiguous rows.
struct LogitsView {
    const float* data;
    std::int64_t classes, height, width;
    std::ptrdiff_t stride_class, stride_y;
    int phases = 1;
    std::ptrdiff_t stride_phase_y = 0, stride_phase_x = 0;
};

// The part of a tile that is pasted: rows y0..y1 and columns x0..x1, ends excluded.
struct Core {
    std::int64_t y0, x0, y1, x1;
};

// Where a core goes. Strides in bytes; rows are contiguous.
struct StitchOutput {
    std::uint8_t* classes;  // (y1 - y0, x1 - x0)
    std::ptrdiff_t classes_stride_y;
    std::uint64_t* counts;          // by winning class: pixels, added to
    std::uint64_t* confidence;      // by winning class: sum of round(p * kConfidenceUnits), added to
    std::uint8_t* probabilities;    // (classes, y1 - y0, x1 - x0): round(p * 255); null for none
    std::ptrdiff_t probabilities_stride_class, probabilities_stride_y;
};

// Returns the number of core pixels with a NaN or infinite logit: they are class 0 with confidence and
// probabilities 0. Ties go to the lowest class.
std::int64_t stitch(const LogitsView& logits, const Core& core, const StitchOutput& output);

enum class LogitsType { fp32, fp16 };
enum class LogitsLayout { nchw, nhwc };

// Where the classes of one tile's core go: the address of its first pixel and the bytes from row to row.
struct StitchTarget {
    std::uint8_t* classes;
    std::int64_t stride_y;
};

// A batch of `count` tiles on a CUDA device: all pointers are device memory. Logits are dense. What the tiles' cores
// come to is as in `stitch`, but counts, confidence and nonfinite are set, not added to, and logits are read once.
struct StitchBatch {
    const void* logits;
    LogitsType type;
    LogitsLayout layout;
    std::int32_t count, classes, height, width;
    const std::int32_t* cores;      // (count, 4): top, left, bottom, right, ends excluded; what lies outside is cut off
    std::uint8_t* ids;              // (count, height, width): a core's classes at the core's place
    const StitchTarget* targets;    // (count): where they go instead of `ids`; null for `ids`
    unsigned long long* counts;     // (count, classes)
    unsigned long long* confidence; // (count, classes)
    unsigned long long* nonfinite;  // (count)
    std::uint8_t* probabilities;    // (count, classes, height, width), at the core's place; null for none
};

// The CUDA sibling (stitch.cu). Only queues work on `stream` (a cudaStream_t). Returns null, or CUDA's own words for
// what failed.
const char* launch_stitch(const StitchBatch& batch, void* stream);

}  // namespace histoseg
