// CUDA sibling of stitch.cpp: what a thread does is in stitch_threads.h; here its sums join those of the others.
#include "cuda_error.h"
#include "stitch_threads.h"

namespace histoseg {

namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kBlockThreads / kWarp;

// One atomic a block for each sum that is not zero. All threads of the block come here.
template <typename Variant>
__device__ void add_block_sums(const StitchBatch& batch, const StitchSums<Variant>& sums) {
    static_assert(Variant::kSums <= static_cast<int>(kBlockThreads), "a thread for each sum");
    __shared__ unsigned long long by_warp[Variant::kSums][kWarps];
    const int thread = static_cast<int>(threadIdx.x);
    HISTOSEG_UNROLL
    for (int k = 0; k < Variant::kSums; ++k) {
        unsigned long long sum = sums.values[k];
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (thread % kWarp == 0) by_warp[k][thread / kWarp] = sum;
    }
    __syncthreads();
    if (thread >= Variant::kSums) return;
    unsigned long long sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += by_warp[thread][warp];
    unsigned long long* total = stitch_total<Variant>(batch, blockIdx.y, thread);
    if (total && sum > 0) atomicAdd(total, sum);
}

template <typename Variant>
__global__ void __launch_bounds__(kBlockThreads) stitch_kernel(const __grid_constant__ StitchBatch batch) {
    StitchSums<Variant> sums;
    stitch_thread<Variant>(batch, {blockIdx.y, blockIdx.x, threadIdx.x, gridDim.x}, sums);
    add_block_sums<Variant>(batch, sums);
}

struct Launch {
    const StitchBatch& batch;
    cudaStream_t stream;

    template <typename Variant>
    cudaError_t operator()(Variant) const {
        const dim3 grid(stitch_blocks<Variant>(batch), static_cast<unsigned>(batch.count));
        stitch_kernel<Variant><<<grid, kBlockThreads, 0, stream>>>(batch);
        return cudaGetLastError();
    }
};

cudaError_t clear(unsigned long long* sums, std::int64_t count, cudaStream_t stream) {
    return cudaMemsetAsync(sums, 0, static_cast<std::size_t>(count) * sizeof *sums, stream);
}

}  // namespace

const char* launch_stitch(const StitchBatch& batch, void* stream) {
    if (batch.count == 0) return nullptr;
    const auto on = static_cast<cudaStream_t>(stream);
    const std::int64_t by_class = std::int64_t{batch.count} * batch.classes;
    cudaError_t status = cudaSuccess;
    if (batch.confidence == batch.counts + by_class && batch.nonfinite == batch.confidence + by_class) {
        status = clear(batch.counts, 2 * by_class + batch.count, on);
    } else {
        status = clear(batch.counts, by_class, on);
        if (status == cudaSuccess) status = clear(batch.confidence, by_class, on);
        if (status == cudaSuccess) status = clear(batch.nonfinite, batch.count, on);
    }
    if (status == cudaSuccess && batch.height > 0 && batch.width > 0) status = with_variant(batch, Launch{batch, on});
    return error_text(status);
}

}  // namespace histoseg
