// Cutting tiles out of an image on the device; what a thread does is in gather_threads.h.
#include "cuda_error.h"
#include "gather_threads.h"

namespace histoseg {

namespace {

__global__ void __launch_bounds__(kBlockThreads) gather_kernel(const __grid_constant__ GatherBatch batch) {
    gather_thread(batch, {blockIdx.y, blockIdx.x, threadIdx.x, gridDim.x});
}

}  // namespace

const char* launch_gather(const GatherBatch& batch, void* stream) {
    if (batch.count == 0 || batch.height == 0 || batch.width == 0) return nullptr;
    const dim3 grid(gather_blocks(batch), static_cast<unsigned>(batch.count));
    gather_kernel<<<grid, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
    return error_text(cudaGetLastError());
}

}  // namespace histoseg
