// CUDA sibling of labels.cpp: the same matching, one thread a pixel.
#include "cuda_error.h"
#include "labels.h"

namespace histoseg {

namespace {

constexpr int kBlock = 256;
constexpr unsigned kMaxBlocks = 1u << 16;

__global__ void decode_kernel(const std::uint8_t* __restrict__ rgb, std::int64_t width, std::int64_t pixels,
                              int channels, std::ptrdiff_t stride_y, const __grid_constant__ PaletteTable palette,
                              std::int32_t max_distance2, std::uint8_t* __restrict__ ids,
                              unsigned long long* __restrict__ counters) {
    unsigned long long approximate = 0, unmatched = 0;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels; i += step) {
        const std::uint8_t* pixel = rgb + (i / width) * stride_y + (i % width) * channels;
        const Match match = nearest_colour(palette, pixel[0], pixel[1], pixel[2]);
        const bool known = match.distance2 <= max_distance2;
        ids[i] = known ? static_cast<std::uint8_t>(match.id) : kUnmatched;
        approximate += known && match.distance2 > 0;
        unmatched += !known;
    }
    // Most labels are exact: the counters' two addresses stay quiet.
    if (approximate > 0) atomicAdd(counters, approximate);
    if (unmatched > 0) atomicAdd(counters + 1, unmatched);
}

}  // namespace

const char* launch_decode_labels(const std::uint8_t* rgb, std::int64_t height, std::int64_t width, int channels,
                                 std::ptrdiff_t stride_y, const PaletteTable& palette, std::int32_t max_distance2,
                                 std::uint8_t* ids, unsigned long long* counters, void* stream) {
    const std::int64_t pixels = height * width;
    if (pixels == 0) return nullptr;
    const std::int64_t needed = (pixels + kBlock - 1) / kBlock;
    const unsigned blocks = needed < kMaxBlocks ? static_cast<unsigned>(needed) : kMaxBlocks;
    decode_kernel<<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        rgb, width, pixels, channels, stride_y, palette, max_distance2, ids, counters);
    return error_text(cudaGetLastError());
}

}  // namespace histoseg
