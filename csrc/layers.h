// Layers of the networks in fp16 that libraries do in more passes over memory than they need.
#pragma once

#include <cstdint>

namespace histoseg {

// All tensors are device memory, C-contiguous and aligned to 16 bytes; halves unless said otherwise, channels last, and
// channels a multiple of 8. A launch only queues work on `stream` (a cudaStream_t); it returns null, or CUDA's own words
// for what failed.

// A first convolution and its ReLU: `to` is (count, rows, columns, channels) of `rgb`, uint8 (count, height, width, 3),
// normalised to value * scale + shift in fp32 and rounded. (kernel, stride, channels) is (3, 1, 64) or (4, 2, 32), and one
// pixel of zeros lies around the normalised image. weights: halves (kernel, reach, channels), by kernel row, then by
// kernel column and channel, `pixel` values to a column, zeros where it has no channel; bias: float32 (channels).
// Products are added in fp32.
struct FirstLayer {
    const std::uint8_t* rgb;
    std::int32_t count, height, width;
    std::int32_t kernel;
    float scale[3], shift[3];
    const void* weights;
    const float* bias;
    void* to;

    std::int32_t stride() const { return kernel == 3 ? 1 : 2; }
    std::int32_t channels() const { return kernel == 3 ? 64 : 32; }
    std::int32_t pixel() const { return 8 / stride(); }
    std::int32_t reach() const { return kernel == 3 ? 32 : 16; }
};
const char* launch_first(const FirstLayer& layer, void* stream);

// The largest of each 2x2 of `from` (count, 2 * height, 2 * width, channels), which a ReLU has left: no value is below 0.
// NaN stays NaN. `to` is (count, height, width, channels).
struct PoolLayer {
    const void* from;
    std::int32_t count, height, width, channels;
    void* to;
};
const char* launch_pool(const PoolLayer& layer, void* stream);

// The ReLU (NaN stays NaN) of what a 2x2 transposed convolution of stride 2 comes to: `from` is (count, height,
// width, 2, 2, channels), the 2x2 of each pixel by row and column, which are put where they belong; `to` is (count, 2 * height, 2 * width, channels).
struct SpreadLayer {
    const void* from;
    std::int32_t count, height, width, channels;
    void* to;
};
const char* launch_spread(const SpreadLayer& layer, void* stream);

// The ReLU of `low` (count, height / 2, width / 2, channels), each pixel standing for 2x2, plus `skip` (count, height,
// width, channels), the sum rounded to fp16: `to`, as large as `skip`.
struct JoinLayer {
    const void* low;
    const void* skip;
    std::int32_t count, height, width, channels;
    void* to;
};
const char* launch_join(const JoinLayer& layer, void* stream);

constexpr std::int32_t kLogitsChannels = 32;
constexpr std::int32_t kMaxLogitsOutputs = 16;

// A last convolution, 3x3 with padding, of `from` (count, height, width, 32) to `outputs` (16 at most) channels, and the
// pixel shuffle behind it: `to` is float32 (count, outputs / shuffle^2, height * shuffle, width * shuffle), `shuffle` 1
// or 2. weights: halves (3, 3, 32, columns) by kernel row, kernel column and channel: two parts, which add up to the
// weights, side by side, each as wide as half of `columns` and zero beyond `outputs`; bias: float32 (outputs). Products
// are added in fp32.
struct LogitsLayer {
    const void* from;
    std::int32_t count, height, width;
    const void* weights;
    const float* bias;
    std::int32_t outputs, shuffle;
    float* to;

    std::int32_t columns() const { return outputs > kMaxLogitsOutputs / 2 ? 2 * kMaxLogitsOutputs : kMaxLogitsOutputs; }
};
const char* launch_logits(const LogitsLayer& layer, void* stream);

}  // namespace histoseg
