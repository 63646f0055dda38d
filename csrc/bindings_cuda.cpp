// What Python sees of the CUDA kernels: memory by its address, so that only numbers can be checked here. Each launch
// over tiles can also be run as loops on the host, on host memory: the tests' proof of the kernels' arithmetic.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings_device.h"
#include "gather_threads.h"
#include "labels.h"
#include "queue.h"
#include "stitch_threads.h"

namespace histoseg {

#ifndef HISTOSEG_CUDA_BUILT
const char* launch_decode_labels(const std::uint8_t*, std::int64_t, std::int64_t, int, std::ptrdiff_t,
                                 const PaletteTable&, std::int32_t, std::uint8_t*, unsigned long long*, void*) {
    return kNotBuilt;
}
const char* launch_stitch(const StitchBatch&, void*) { return kNotBuilt; }
const char* launch_gather(const GatherBatch&, void*) { return kNotBuilt; }
const char* queue_copy(void*, const void*, std::int64_t, void*) { return kNotBuilt; }
const char* queue_record(void*, void*) { return kNotBuilt; }
const char* queue_wait(void*, void*) { return kNotBuilt; }
#endif

namespace {

// `count` tiles of `height` x `width` pixels, as a launch takes them.
void check_tiles(std::int64_t count, std::int64_t height, std::int64_t width) {
    checked_number(count, "n", 0, kMaxTiles);
    checked_number(height, "h", 0, kMaxTilePixels);
    checked_number(width, "w", 0, kMaxTilePixels);
    if (height * width > kMaxTilePixels) {
        fail("h, w", "expected at most " + std::to_string(kMaxTilePixels) + " pixels a tile, got " +
                         std::to_string(height) + " x " + std::to_string(width));
    }
}

// Index of `text` in two names.
bool is_second(const std::string& text, const char* name, const char* first, const char* second) {
    if (text != first && text != second) {
        fail(name, std::string("expected ") + first + " or " + second + ", got " + text);
    }
    return text == second;
}

// Calls body(place) for every thread of a launch, in the order of a machine that has one processor.
template <typename Body>
void for_each_thread(std::uint32_t tile, std::uint32_t block, std::uint32_t blocks, const Body& body) {
    for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) body(ThreadPlace{tile, block, thread, blocks});
}

struct HostStitch {
    const StitchBatch& batch;

    template <typename Variant>
    void operator()(Variant) const {
        const std::uint32_t blocks = stitch_blocks<Variant>(batch);
        for (std::uint32_t tile = 0; tile < static_cast<std::uint32_t>(batch.count); ++tile) {
            for (std::uint32_t block = 0; block < blocks; ++block) run_block<Variant>(tile, block, blocks);
        }
    }

    template <typename Variant>
    void run_block(std::uint32_t tile, std::uint32_t block, std::uint32_t blocks) const {
        unsigned long long totals[Variant::kSums] = {};
        for_each_thread(tile, block, blocks, [&](const ThreadPlace& place) {
            StitchSums<Variant> sums;
            stitch_thread<Variant>(batch, place, sums);
            for (int k = 0; k < Variant::kSums; ++k) totals[k] += sums.values[k];
        });
        for (int k = 0; k < Variant::kSums; ++k) {
            if (unsigned long long* total = stitch_total<Variant>(batch, tile, k)) *total += totals[k];
        }
    }
};

// launch_stitch on the host.
const char* emulate_stitch(const StitchBatch& batch, void*) {
    if (batch.count == 0) return nullptr;
    const std::int64_t by_class = std::int64_t{batch.count} * batch.classes;
    std::fill_n(batch.counts, by_class, 0);
    std::fill_n(batch.confidence, by_class, 0);
    std::fill_n(batch.nonfinite, batch.count, 0);
    if (batch.height > 0 && batch.width > 0) with_variant(batch, HostStitch{batch});
    return nullptr;
}

// launch_gather on the host.
const char* emulate_gather(const GatherBatch& batch, void*) {
    if (batch.height == 0 || batch.width == 0) return nullptr;
    const std::uint32_t blocks = gather_blocks(batch);
    for (std::uint32_t tile = 0; tile < static_cast<std::uint32_t>(batch.count); ++tile) {
        for (std::uint32_t block = 0; block < blocks; ++block) {
            for_each_thread(tile, block, blocks, [&](const ThreadPlace& place) { gather_thread(batch, place); });
        }
    }
    return nullptr;
}

using LaunchStitch = const char* (*)(const StitchBatch& batch, void* stream);
using LaunchGather = const char* (*)(const GatherBatch& batch, void* stream);

template <LaunchStitch kLaunch>
void py_stitch_batch(Address logits, const std::string& dtype, const std::string& layout, std::int64_t n,
                     std::int64_t classes, std::int64_t h, std::int64_t w, Address cores, Address ids, Address counts,
                     Address confidence, Address broken, Address probabilities, Address stream, Address targets) {
    check_tiles(n, h, w);
    checked_number(classes, "classes", 1, kMaxClasses);
    const bool tiles = n > 0, pixels = n * h * w > 0;
    StitchBatch batch{};
    const bool half = is_second(dtype, "dtype", "fp32", "fp16");
    batch.type = half ? LogitsType::fp16 : LogitsType::fp32;
    batch.logits = half ? static_cast<const void*>(checked_address<const Half>(logits, "logits_ptr", pixels))
                        : checked_address<const float>(logits, "logits_ptr", pixels);
    batch.layout = is_second(layout, "layout", "nchw", "nhwc") ? LogitsLayout::nhwc : LogitsLayout::nchw;
    batch.count = static_cast<std::int32_t>(n);
    batch.classes = static_cast<std::int32_t>(classes);
    batch.height = static_cast<std::int32_t>(h);
    batch.width = static_cast<std::int32_t>(w);
    batch.cores = checked_address<const std::int32_t>(cores, "cores_ptr", tiles);
    batch.targets = checked_address<const StitchTarget>(targets, "targets_ptr", false);
    batch.ids = checked_address<std::uint8_t>(ids, "ids_ptr", pixels && targets == 0);
    batch.counts = checked_address<unsigned long long>(counts, "counts_ptr", tiles);
    batch.confidence = checked_address<unsigned long long>(confidence, "confidence_ptr", tiles);
    batch.nonfinite = checked_address<unsigned long long>(broken, "broken_ptr", tiles);
    batch.probabilities = checked_address<std::uint8_t>(probabilities, "probabilities_ptr", false);
    check_launch("stitch", kLaunch(batch, reinterpret_cast<void*>(stream)));  // see queue.h
}

template <LaunchGather kLaunch>
void py_gather(Address image, std::int64_t image_h, std::int64_t image_w, std::int64_t image_stride, std::int64_t n,
               std::int64_t h, std::int64_t w, Address origins, Address tiles, Address stream) {
    constexpr std::int64_t kMaxSide = std::int64_t{1} << 30;
    check_tiles(n, h, w);
    checked_number(image_h, "image_h", 1, kMaxSide);
    checked_number(image_w, "image_w", 1, kMaxSide);
    if (image_stride < 3 * image_w) {
        fail("image_stride", "expected " + std::to_string(3 * image_w) + " bytes or more, got " +
                                 std::to_string(image_stride));
    }
    const bool pixels = n * h * w > 0;
    GatherBatch batch{};
    batch.image = checked_address<const std::uint8_t>(image, "image_ptr", pixels);
    batch.image_height = static_cast<std::int32_t>(image_h);
    batch.image_width = static_cast<std::int32_t>(image_w);
    batch.image_stride = image_stride;
    batch.count = static_cast<std::int32_t>(n);
    batch.height = static_cast<std::int32_t>(h);
    batch.width = static_cast<std::int32_t>(w);
    batch.origins = checked_address<const std::int32_t>(origins, "origins_ptr", pixels);
    batch.tiles = checked_address<std::uint8_t>(tiles, "tiles_ptr", pixels);
    const py::gil_scoped_release released;
    check_launch("gather", kLaunch(batch, reinterpret_cast<void*>(stream)));
}

void py_cuda_decode_labels(Address rgb, std::int64_t h, std::int64_t w, int channels, std::int64_t stride,
                           const py::object& palette_object, double tolerance, Address ids, Address counters,
                           Address stream) {
    constexpr std::int64_t kMaxSide = std::int64_t{1} << 30;
    checked_number(h, "h", 0, kMaxSide);
    checked_number(w, "w", 0, kMaxSide);
    checked_number(channels, "channels", 3, 4);
    if (stride < channels * w) {
        fail("stride", "expected " + std::to_string(channels * w) + " bytes or more, got " + std::to_string(stride));
    }
    const PaletteTable palette = checked_palette(palette_object);
    if (!(tolerance >= 0)) fail("tolerance", "expected a number of 0 or more, got " + std::to_string(tolerance));
    const bool pixels = h * w > 0;
    const auto* from = checked_address<const std::uint8_t>(rgb, "rgb_ptr", pixels);
    auto* to = checked_address<std::uint8_t>(ids, "ids_ptr", pixels);
    auto* sums = checked_address<unsigned long long>(counters, "counters_ptr", pixels);
    const py::gil_scoped_release released;
    check_launch("decode_labels", launch_decode_labels(from, h, w, channels, stride, palette,
                                                       tolerance_to_distance2(tolerance), to, sums,
                                                       reinterpret_cast<void*>(stream)));
}

void py_copy(Address to, Address from, std::int64_t bytes, Address stream) {
    checked_number(bytes, "bytes", 0, std::int64_t{1} << 48);
    auto* target = checked_address<char>(to, "to_ptr", bytes > 0);
    const auto* source = checked_address<const char>(from, "from_ptr", bytes > 0);
    check_launch("copy", queue_copy(target, source, bytes, reinterpret_cast<void*>(stream)));
}

void py_record(Address event, Address stream) {
    check_launch("record", queue_record(reinterpret_cast<void*>(event), reinterpret_cast<void*>(stream)));
}

void py_wait(Address stream, Address event) {
    check_launch("wait", queue_wait(reinterpret_cast<void*>(stream), reinterpret_cast<void*>(event)));
}

template <LaunchStitch kLaunch>
void define_stitch(py::module_& m, const char* name, const char* text) {
    using namespace pybind11::literals;
    m.def(name, &py_stitch_batch<kLaunch>, "logits_ptr"_a, "dtype"_a, "layout"_a, "n"_a, "classes"_a, "h"_a, "w"_a,
          "cores_ptr"_a, "ids_ptr"_a, "counts_ptr"_a, "confidence_ptr"_a, "broken_ptr"_a, "probabilities_ptr"_a,
          "stream"_a, py::kw_only(), "targets_ptr"_a = 0, text);
}

template <LaunchGather kLaunch>
void define_gather(py::module_& m, const char* name, const char* text) {
    using namespace pybind11::literals;
    m.def(name, &py_gather<kLaunch>, "image_ptr"_a, "image_h"_a, "image_w"_a, "image_stride"_a, "n"_a, "h"_a, "w"_a,
          "origins_ptr"_a, "tiles_ptr"_a, "stream"_a, text);
}

}  // namespace

void bind_cuda(py::module_& m) {
    using namespace pybind11::literals;
#ifdef HISTOSEG_CUDA_BUILT
    m.attr("cuda_built") = true;
#else
    m.attr("cuda_built") = false;
#endif
    define_stitch<launch_stitch>(
        m, "cuda_stitch",
        "Queues on `stream` the stitching of n tiles of logits, fp32 or fp16, (n, classes, h, w) or (n, h, w, "
        "classes). cores: int32 (n, 4) of top, left, bottom, right in the tile. Set: ids uint8 (n, h, w) within the "
        "cores; counts, confidence uint64 (n, classes); broken uint64 (n), pixels with a logit that is not finite; "
        "unless 0, probabilities uint8 (n, classes, h, w) within the cores. targets: int64 (n, 2), for each core the "
        "address of its first id and the bytes from row to row, instead of ids. All of it memory of the current "
        "device.");
    define_stitch<emulate_stitch>(m, "emulate_stitch", "For tests: cuda_stitch's threads one by one, on host memory.");
    define_gather<launch_gather>(
        m, "cuda_gather",
        "Queues on `stream` the cutting of n tiles, uint8 (n, h, w, 3), out of an image uint8 (image_h, image_w, 3) "
        "with rows image_stride bytes apart, reflected at its far edges. origins: int32 (n, 2) of row, column, 0 or "
        "more.");
    define_gather<emulate_gather>(m, "emulate_gather", "For tests: cuda_gather's threads one by one, on host memory.");
    m.def("cuda_copy", &py_copy, "to_ptr"_a, "from_ptr"_a, "bytes"_a, "stream"_a,
          "Queues on `stream` a copy between the device's memory and page-locked memory, either way, or within one.");
    m.def("cuda_record", &py_record, "event"_a, "stream"_a, "Lets `event` happen once all on `stream` is done.");
    m.def("cuda_wait", &py_wait, "stream"_a, "event"_a, "Lets what is queued on `stream` from now on wait for `event`.");
    m.def("cuda_decode_labels", &py_cuda_decode_labels, "rgb_ptr"_a, "h"_a, "w"_a, "channels"_a, "stride"_a,
          "palette"_a, "tolerance"_a, "ids_ptr"_a, "counters_ptr"_a, "stream"_a,
          "Queues on `stream` the decoding of a uint8 (h, w, 3 or 4) label with rows `stride` bytes apart to uint8 "
          "(h, w) ids; adds to counters, uint64 approximate and unmatched. The palette is host memory, all else the "
          "device's.");
}

}  // namespace histoseg
