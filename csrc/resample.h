// Resampling of RGB rows: every output pixel is a weighted mean of a few source pixels, rows first, then columns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace histoseg {

// Weights are fixed-point: those of one output pixel add up to kResampleOne.
constexpr int kResampleBits = 14;
constexpr std::int32_t kResampleOne = 1 << kResampleBits;

// Along one axis: output i is the mean of the sources first[i] .. first[i] + taps - 1, weighted by
// weights[i * taps ..]. A tap of weight 0 may lie outside of the source and is not read.
struct Taps {
    const std::int32_t* first;
    const std::uint16_t* weights;
    std::int64_t count;
    std::int64_t taps;
};

// Rows of an RGB image, pixels packed within a row; strides in bytes, any sign.
struct ResampleView {
    const std::uint8_t* source;  // (height, width, 3)
    std::ptrdiff_t source_stride_y;
    std::int64_t height, width;
    std::uint8_t* out;  // (rows.count, columns.count, 3)
    std::ptrdiff_t out_stride_y;
};

// Whether `first` is never negative, every tap that counts lies below `size`, and the weights of each output add up to
// kResampleOne.
bool taps_fit(const Taps& taps, std::int64_t size);

// Fills `out`. Each output row depends on its own source rows alone, so any cut into bands gives the same bytes. The
// mean of the rows is kept to 1/256 grey level; the result is rounded to nearest.
void resample(const ResampleView& view, const Taps& rows, const Taps& columns);

}  // namespace histoseg
