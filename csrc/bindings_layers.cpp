// What Python sees of the layers' kernels. On the host, on host memory, tests run the threads of those that only move
// memory as loops, and the same sums as the convolutions', whose kernels only a GPU has: what the networks' order of
// layers is tested with.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings_device.h"
#include "layers_threads.h"

namespace histoseg {

#ifndef HISTOSEG_CUDA_BUILT
const char* launch_first(const FirstLayer&, void*) { return kNotBuilt; }
const char* launch_pool(const PoolLayer&, void*) { return kNotBuilt; }
const char* launch_spread(const SpreadLayer&, void*) { return kNotBuilt; }
const char* launch_join(const JoinLayer&, void*) { return kNotBuilt; }
const char* launch_logits(const LogitsLayer&, void*) { return kNotBuilt; }
#endif

namespace {

constexpr std::int64_t kMaxRows = 65535;  // the limit of a grid's second axis; kMaxTiles is that of its third, too
// A row is 2^28 pieces at most, which a thread counts in 32 bits.
constexpr std::int64_t kMaxSide = std::int64_t{1} << 18, kMaxChannels = std::int64_t{1} << 12;
constexpr std::uint32_t kVector = 16;

template <typename Body>
const char* on_host(std::int32_t count, std::int32_t rows, std::int64_t pieces, const Body& body) {
    for (std::uint32_t tile = 0; tile < static_cast<std::uint32_t>(count); ++tile) {
        for (std::uint32_t row = 0; row < static_cast<std::uint32_t>(rows); ++row) {
            for (std::uint32_t piece = 0; piece < pieces; ++piece) body(LayerPlace{tile, row, piece});
        }
    }
    return nullptr;
}

// One channel of a pixel of the first convolution before the ReLU.
float one_sum(const FirstLayer& layer, const LayerPlace& place, std::int32_t channel) {
    const auto* weights = static_cast<const Half*>(layer.weights);
    const auto top = static_cast<std::int32_t>(place.row) * layer.stride() - 1;
    const auto left = static_cast<std::int32_t>(place.piece) * layer.stride() - 1;
    float sum = 0.0f;
    for (std::int32_t value = 0; value < layer.kernel * layer.kernel * 3; ++value) {
        const std::int32_t down = value / (3 * layer.kernel), across = value / 3 % layer.kernel, c = value % 3;
        const Half* row = weights + (down * layer.reach() + across * layer.pixel() + c) * layer.channels();
        sum += to_float(normalised(layer, place.tile, top + down, left + across, c)) * to_float(row[channel]);
    }
    return sum + layer.bias[channel];
}

const char* emulate_first(const FirstLayer& layer, void*) {
    const std::int32_t rows = layer.height / layer.stride(), columns = layer.width / layer.stride();
    return on_host(layer.count, rows, columns, [&](const LayerPlace& place) {
        const std::int64_t pixel = (std::int64_t{place.tile} * rows + place.row) * columns + place.piece;
        for (std::int32_t c = 0; c < layer.channels(); ++c) {
            const std::uint32_t bits = greater_halves(to_half(one_sum(layer, place, c)).bits, 0);
            static_cast<Half*>(layer.to)[pixel * layer.channels() + c].bits = static_cast<std::uint16_t>(bits);
        }
    });
}

const char* emulate_pool(const PoolLayer& layer, void*) {
    return on_host(layer.count, layer.height, pool_pieces(layer), [&](const LayerPlace& p) { pool_thread(layer, p); });
}

const char* emulate_spread(const SpreadLayer& layer, void*) {
    return on_host(layer.count, 2 * layer.height, spread_pieces(layer),
                   [&](const LayerPlace& p) { spread_thread(layer, p); });
}

const char* emulate_join(const JoinLayer& layer, void*) {
    return on_host(layer.count, layer.height, join_pieces(layer), [&](const LayerPlace& p) { join_thread(layer, p); });
}

// One pixel of the last convolution before the shuffle.
float one_logit(const LogitsLayer& layer, std::int64_t tile, std::int32_t y, std::int32_t x, std::int32_t output) {
    const auto* from = static_cast<const Half*>(layer.from);
    const auto* weights = static_cast<const Half*>(layer.weights);
    float sum = 0.0f;
    for (std::int32_t tap = 0; tap < 9; ++tap) {
        const std::int32_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
        if (row < 0 || row >= layer.height || column < 0 || column >= layer.width) continue;
        const Half* pixel = from + ((tile * layer.height + row) * layer.width + column) * kLogitsChannels;
        for (std::int32_t c = 0; c < kLogitsChannels; ++c) {
            const Half* weight = weights + (tap * kLogitsChannels + c) * layer.columns() + output;
            sum += to_float(pixel[c]) * to_float(weight[0]);
            sum += to_float(pixel[c]) * to_float(weight[layer.columns() / 2]);
        }
    }
    return sum + layer.bias[output];
}

const char* emulate_logits(const LogitsLayer& layer, void*) {
    const std::int32_t shuffle = layer.shuffle, classes = layer.outputs / (shuffle * shuffle);
    const std::int64_t width = std::int64_t{layer.width} * shuffle, height = std::int64_t{layer.height} * shuffle;
    return on_host(layer.count, layer.height, layer.width, [&](const LayerPlace& place) {
        const auto y = static_cast<std::int32_t>(place.row), x = static_cast<std::int32_t>(place.piece);
        for (std::int32_t output = 0; output < layer.outputs; ++output) {
            const std::int32_t c = output / (shuffle * shuffle), part = output % (shuffle * shuffle);
            const std::int64_t plane = std::int64_t{place.tile} * classes + c;
            const std::int64_t row = plane * height + y * shuffle + part / shuffle;
            layer.to[row * width + x * shuffle + part % shuffle] = one_logit(layer, place.tile, y, x, output);
        }
    });
}

// The address of a tensor whose pieces are read and written whole.
template <typename T>
T* tensor_at(Address address, const char* name, bool needed) {
    if (address % kVector != 0) fail(name, "is not aligned to 16 bytes");
    return checked_address<T>(address, name, needed);
}

// Sets the sides of a layer that goes through `rows` rows one by one; false if there is nothing in it.
template <typename Layer>
bool set_sides(Layer& layer, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t rows) {
    checked_number(n, "n", 0, kMaxTiles);
    checked_number(h, "h", 0, kMaxSide);
    checked_number(rows, "rows", 0, kMaxRows);
    checked_number(w, "w", 0, kMaxSide);
    layer.count = static_cast<std::int32_t>(n);
    layer.height = static_cast<std::int32_t>(h);
    layer.width = static_cast<std::int32_t>(w);
    return n * h * w > 0;
}

std::int32_t checked_channels(std::int64_t channels) {
    checked_number(channels, "channels", kPieceChannels, kMaxChannels);
    if (channels % kPieceChannels != 0) fail("channels", "expected a multiple of 8, got " + std::to_string(channels));
    return static_cast<std::int32_t>(channels);
}

template <const char* (*kLaunch)(const FirstLayer&, void*)>
void py_first(Address rgb, std::int64_t n, std::int64_t h, std::int64_t w, int kernel, std::array<float, 3> scale,
              std::array<float, 3> shift, Address weights, Address bias, Address to, Address stream) {
    checked_number(kernel, "kernel", 3, 4);
    FirstLayer layer{};
    layer.kernel = kernel;
    const bool any = set_sides(layer, n, h, w, h / layer.stride());
    if (h % layer.stride() || w % layer.stride()) fail("h, w", "expected multiples of the stride, 2");
    layer.rgb = checked_address<const std::uint8_t>(rgb, "rgb_ptr", any);
    for (std::size_t c = 0; c < 3; ++c) {
        layer.scale[c] = scale[c];
        layer.shift[c] = shift[c];
    }
    layer.weights = tensor_at<const char>(weights, "weights_ptr", any);
    layer.bias = checked_address<const float>(bias, "bias_ptr", any);
    layer.to = tensor_at<char>(to, "to_ptr", any);
    check_launch("first", kLaunch(layer, reinterpret_cast<void*>(stream)));
}

// Pool and spread.
template <typename Layer, const char* (*kLaunch)(const Layer&, void*)>
void py_two_by_two(Address from, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t channels, Address to,
                   Address stream) {
    Layer layer{};
    const bool any = set_sides(layer, n, h, w, 2 * h);
    layer.from = tensor_at<const char>(from, "from_ptr", any);
    layer.channels = checked_channels(channels);
    layer.to = tensor_at<char>(to, "to_ptr", any);
    check_launch("layer", kLaunch(layer, reinterpret_cast<void*>(stream)));
}

template <const char* (*kLaunch)(const JoinLayer&, void*)>
void py_join(Address low, Address skip, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t channels,
             Address to, Address stream) {
    JoinLayer layer{};
    const bool any = set_sides(layer, n, h, w, h);
    if (h % 2 || w % 2) fail("h, w", "expected multiples of 2");
    layer.low = tensor_at<const char>(low, "low_ptr", any);
    layer.skip = tensor_at<const char>(skip, "skip_ptr", any);
    layer.channels = checked_channels(channels);
    layer.to = tensor_at<char>(to, "to_ptr", any);
    check_launch("join", kLaunch(layer, reinterpret_cast<void*>(stream)));
}

template <const char* (*kLaunch)(const LogitsLayer&, void*)>
void py_logits(Address from, std::int64_t n, std::int64_t h, std::int64_t w, Address weights, Address bias, int outputs,
               int shuffle, Address to, Address stream) {
    LogitsLayer layer{};
    const bool any = set_sides(layer, n, h, w, h);
    checked_number(outputs, "outputs", 1, kMaxLogitsOutputs);
    checked_number(shuffle, "shuffle", 1, 2);
    if (outputs % (shuffle * shuffle)) fail("outputs", "expected a multiple of 4 to shuffle");
    layer.from = tensor_at<const char>(from, "from_ptr", any);
    layer.weights = tensor_at<const char>(weights, "weights_ptr", any);
    layer.bias = checked_address<const float>(bias, "bias_ptr", any);
    layer.outputs = outputs;
    layer.shuffle = shuffle;
    layer.to = tensor_at<float>(to, "to_ptr", any);
    check_launch("logits", kLaunch(layer, reinterpret_cast<void*>(stream)));
}

template <const char* (*kFirst)(const FirstLayer&, void*), const char* (*kPool)(const PoolLayer&, void*),
          const char* (*kSpread)(const SpreadLayer&, void*), const char* (*kJoin)(const JoinLayer&, void*),
          const char* (*kLogits)(const LogitsLayer&, void*)>
void define(py::module_& m, const std::string& prefix, const char* where) {
    using namespace pybind11::literals;
    const auto text = [&](const char* what) { return std::string(what) + where; };
    m.def((prefix + "first").c_str(), &py_first<kFirst>, "rgb_ptr"_a, "n"_a, "h"_a, "w"_a, "kernel"_a, "scale"_a,
          "shift"_a, "weights_ptr"_a, "bias_ptr"_a, "to_ptr"_a, "stream"_a,
          text("ReLU of a first convolution of normalised RGB (value * scale + shift) of uint8 (n, h, w, 3), sums in fp32: "
               "fp16 (n, h, w, 64) for a kernel of 3, (n, h / 2, w / 2, 32) for one of 4 and stride 2, with a pixel of "
               "padding. weights: fp16 (3, 4, 8, 64) or (4, 4, 4, 32) by kernel row, kernel column, channel and output, "
               "zeros where there is no such column or channel. bias: float32. ").c_str());
    m.def((prefix + "pool").c_str(), &py_two_by_two<PoolLayer, kPool>, "from_ptr"_a, "n"_a, "h"_a, "w"_a, "channels"_a,
          "to_ptr"_a, "stream"_a,
          text("2x2 maxima, fp16 (n, h, w, channels), of what a ReLU left, (n, 2h, 2w, channels). ").c_str());
    m.def((prefix + "spread").c_str(), &py_two_by_two<SpreadLayer, kSpread>, "from_ptr"_a, "n"_a, "h"_a, "w"_a,
          "channels"_a, "to_ptr"_a, "stream"_a,
          text("ReLU of fp16 (n, h, w, 2, 2, channels), put at (n, 2h, 2w, channels). ").c_str());
    m.def((prefix + "join").c_str(), &py_join<kJoin>, "low_ptr"_a, "skip_ptr"_a, "n"_a, "h"_a, "w"_a, "channels"_a,
          "to_ptr"_a, "stream"_a,
          text("ReLU of the sum, in fp16, of skip (n, h, w, channels) and of low (n, h / 2, w / 2, channels) made twice "
               "as large. ").c_str());
    m.def((prefix + "logits").c_str(), &py_logits<kLogits>, "from_ptr"_a, "n"_a, "h"_a, "w"_a, "weights_ptr"_a,
          "bias_ptr"_a, "outputs"_a, "shuffle"_a, "to_ptr"_a, "stream"_a,
          text("3x3 convolution of fp16 (n, h, w, 32) to `outputs` channels, sums in fp32, and the pixel shuffle by "
               "`shuffle`: float32 (n, outputs / shuffle^2, h * shuffle, w * shuffle). weights: fp16 (3, 3, 32, "
               "2, 16), for 8 outputs or fewer (3, 3, 32, 2, 8): two parts that add up, zeros beyond the outputs. bias: "
               "float32 (outputs). ").c_str());
}

}  // namespace

void bind_layers(py::module_& m) {
    define<launch_first, launch_pool, launch_spread, launch_join, launch_logits>(
        m, "cuda_", "Queued on `stream`; all of it memory of the current device, aligned to 16 bytes.");
    define<emulate_first, emulate_pool, emulate_spread, emulate_join, emulate_logits>(
        m, "emulate_", "For tests, on host memory: the kernel's threads one by one, or a convolution's sums in plain loops.");
}

}  // namespace histoseg
