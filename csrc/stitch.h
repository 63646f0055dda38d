// Logits of a tile to classes of the image: argmax, crop, paste and the sums behind shares and mean confidence.
#pragma once

#include <cstddef>
#include <cstdint>

#include "labels_pixel.h"

namespace histoseg {

// One unit of confidence: sums of whole units are exact, so they do not depend on the order of tiles.
constexpr int kConfidenceUnits = 65535;

// Logits (classes, height, width), float32, last axis contiguous; other strides in bytes, any sign.
struct LogitsView {
    const float* data;
    std::int64_t classes, height, width;
    std::ptrdiff_t stride_class, stride_y;
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

}  // namespace histoseg
