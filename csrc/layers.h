// Layers of the networks in fp16 that libraries do in more passes over memory than they need.
#pragma once

#include <cstdint>

namespace histoseg {

// All tensors are device memory, C-contiguous and aligned to 16 bytes; halves unless said otherwise, channels last, and
// channels a multiple of 8. A launch only queues work on `stream` (a cudaStream_t); it returns null, or CUDA's own words
// for what failed.

// What a first convolution of `kernel` x `kernel` weights reads: `to` is (count, rows, columns, unfolded), for each of its
// pixels the normalised RGB (value * scale + shift in fp32) of `rgb`, uint8 (count, height, width, 3), by kernel row,
// kernel column and channel, then zeros up to `unfolded`, a multiple of 8. Outside the image all is zero. (kernel,
// stride) is (3, 1) or (4, 2), and one pixel of padding goes with both.
struct UnfoldLayer {
    const std::uint8_t* rgb;
    std::int32_t count, height, width;
    std::int32_t kernel;
    float scale[3], shift[3];
    void* to;

    std::int32_t stride() const { return kernel == 3 ? 1 : 2; }
    std::int32_t rows() const { return height / stride(); }
    std::int32_t columns() const { return width / stride(); }
    std::int32_t unfolded() const { return kernel == 3 ? 32 : 48; }
};
const char* launch_unfold(const UnfoldLayer& layer, void* stream);

// The largest of each 2x2 of `from` (count, 2 * height, 2 * width, channels), which a ReLU has left: no value is below 0.
// NaN stays NaN. `to` is (count, height, width, channels).
struct PoolLayer {
    const void* from;
    std::int32_t count, height, width, channels;
    void* to;
};
const char* launch_pool(const PoolLayer& layer, void* stream);

// The ReLU of what a 2x2 transposed convolution of stride 2 comes to, put where it belongs: `from` is (count, height,
// width, 2, 2, channels), the 2x2 of each pixel by row and column; `to` is (count, 2 * height, 2 * width, channels).
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
// or 2. weights: halves (2, 3, 3, 32, 16), whose two parts add up to the weights by kernel row, kernel column, channel
// and output, zero beyond `outputs`; bias: float32 (outputs). Products are added in fp32.
struct LogitsLayer {
    const void* from;
    std::int32_t count, height, width;
    const void* weights;
    const float* bias;
    std::int32_t outputs, shuffle;
    float* to;
};
const char* launch_logits(const LogitsLayer& layer, void* stream);

}  // namespace histoseg
