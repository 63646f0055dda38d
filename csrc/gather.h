// Tiles cut out of an image that lies on a CUDA device.
#pragma once

#include <cstdint>

namespace histoseg {

// All pointers are device memory. The image is 8-bit (height, width, 3), rows `image_stride` bytes apart, and goes on
// beyond its far edges by reflection as in tiling.py; tile i begins at row origins[2 * i], column origins[2 * i + 1],
// neither below 0. `tiles` is (count, height, width, 3), C-contiguous.
struct GatherBatch {
    const std::uint8_t* image;
    std::int32_t image_height, image_width;
    std::int64_t image_stride;
    std::int32_t count, height, width;
    const std::int32_t* origins;
    std::uint8_t* tiles;
};

// In gather.cu. Only queues work on `stream` (a cudaStream_t). Returns null, or CUDA's own words for what failed.
const char* launch_gather(const GatherBatch& batch, void* stream);

}  // namespace histoseg
