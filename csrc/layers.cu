// Layers of the networks on the device. What a thread of the four that only move memory does is in layers_threads.h;
// the last convolution runs on the matrix units.
#include <mma.h>

#include "cuda_error.h"
#include "layers_threads.h"

namespace histoseg {

namespace {

struct UnfoldBody {
    UnfoldLayer layer;
    __device__ void operator()(const LayerPlace& place) const {
        if (layer.kernel == 3) {
            unfold_thread<3>(layer, place);
        } else {
            unfold_thread<4>(layer, place);
        }
    }
};

struct PoolBody {
    PoolLayer layer;
    __device__ void operator()(const LayerPlace& place) const { pool_thread(layer, place); }
};

struct SpreadBody {
    SpreadLayer layer;
    __device__ void operator()(const LayerPlace& place) const { spread_thread(layer, place); }
};

struct JoinBody {
    JoinLayer layer;
    __device__ void operator()(const LayerPlace& place) const { join_thread(layer, place); }
};

template <typename Body>
__global__ void __launch_bounds__(kBlockThreads) layer_kernel(const __grid_constant__ Body body, std::uint32_t pieces) {
    const std::uint32_t piece = blockIdx.x * kBlockThreads + threadIdx.x;
    if (piece < pieces) body({blockIdx.z, blockIdx.y, piece});
}

template <typename Body>
const char* launch(const Body& body, std::int32_t count, std::int32_t rows, std::int64_t pieces, void* stream) {
    if (count == 0 || rows == 0 || pieces == 0) return nullptr;
    const dim3 grid(static_cast<unsigned>((pieces + kBlockThreads - 1) / kBlockThreads), static_cast<unsigned>(rows),
                    static_cast<unsigned>(count));
    layer_kernel<<<grid, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(body,
                                                                               static_cast<std::uint32_t>(pieces));
    return error_text(cudaGetLastError());
}

// A block of the last convolution: kWarps rows of kColumns pixels, a row to a warp, 16 pixels and outputs at a time.
constexpr int kWarps = 8, kColumns = 32, kSide = 16;
constexpr int kChannels = kLogitsChannels;
constexpr int kInRows = kWarps + 2, kInColumns = kColumns + 2;
constexpr int kPixelHalves = kChannels + 16;   // padded: fragments begin at multiples of 32 bytes, and banks differ
constexpr int kWeights = 9 * kChannels * kSide;  // of one part
constexpr int kOutStride = kSide + 4;
constexpr int kInBytes = kInRows * kInColumns * kPixelHalves * 2;
constexpr int kSharedBytes = kInBytes + 2 * kWeights * 2;
static_assert(kWarps * kColumns * kOutStride * 4 <= kInBytes, "results lie where the input was");
static_assert(kWarps * 32 == kBlockThreads && kMaxLogitsOutputs == kSide);

__device__ void load_input(const LogitsLayer& layer, int top, int left, char* shared) {
    constexpr int kPieces = kChannels / kPieceChannels;
    for (int i = static_cast<int>(threadIdx.x); i < kInRows * kInColumns * kPieces; i += kBlockThreads) {
        const int part = i % kPieces, pixel = i / kPieces;
        const int y = top + pixel / kInColumns, x = left + pixel % kInColumns;
        HalfWords words = {};
        if (y >= 0 && y < layer.height && x >= 0 && x < layer.width) {
            const std::int64_t row = std::int64_t{blockIdx.z} * layer.height + y;
            load_16(piece_at(layer.from, (row * layer.width + x) * kPieces + part), words);
        }
        store_16(shared + pixel * kPixelHalves * 2 + part * 16, words);
    }
}

__device__ void write_results(const LogitsLayer& layer, int y, int x, const float* results) {
    if (y >= layer.height || x >= layer.width) return;
    const std::int64_t width = std::int64_t{layer.width} * layer.shuffle;
    const std::int64_t height = std::int64_t{layer.height} * layer.shuffle;
    const int classes = layer.outputs / (layer.shuffle * layer.shuffle);
    float* to = layer.to + blockIdx.z * classes * height * width;
    for (int c = 0; c < classes; ++c, to += height * width) {
        if (layer.shuffle == 1) {
            to[y * width + x] = results[c] + layer.bias[c];
            continue;
        }
        for (int below = 0; below < 2; ++below) {
            const int first = 4 * c + 2 * below;
            const float2 pair = {results[first] + layer.bias[first], results[first + 1] + layer.bias[first + 1]};
            *reinterpret_cast<float2*>(to + (2 * y + below) * width + 2 * x) = pair;
        }
    }
}

__global__ void __launch_bounds__(kBlockThreads) logits_kernel(const __grid_constant__ LogitsLayer layer) {
    namespace wmma = nvcuda::wmma;
    extern __shared__ __align__(32) char shared[];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int top = static_cast<int>(blockIdx.y) * kWarps, left = static_cast<int>(blockIdx.x) * kColumns;
    load_input(layer, top - 1, left - 1, shared);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kWeights / kPieceChannels; i += kBlockThreads) {
        HalfWords words;
        load_16(piece_at(layer.weights, i), words);
        store_16(shared + kInBytes + 16 * i, words);
    }
    __syncthreads();
    const __half* input = reinterpret_cast<const __half*>(shared);
    const __half* weights = reinterpret_cast<const __half*>(shared + kInBytes);
    wmma::fragment<wmma::accumulator, kSide, kSide, kSide, float> sums[kColumns / kSide];
    for (auto& sum : sums) wmma::fill_fragment(sum, 0.0f);
    HISTOSEG_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
        HISTOSEG_UNROLL
        for (int channel = 0; channel < kChannels; channel += kSide) {
            wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, __half, wmma::row_major> high, low;
            const __half* part = weights + (tap * kChannels + channel) * kSide;
            wmma::load_matrix_sync(high, part, kSide);
            wmma::load_matrix_sync(low, part + kWeights, kSide);
            HISTOSEG_UNROLL
            for (int side = 0; side < kColumns / kSide; ++side) {
                wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, __half, wmma::row_major> pixels;
                const int first = (warp + tap / 3) * kInColumns + side * kSide + tap % 3;
                wmma::load_matrix_sync(pixels, input + first * kPixelHalves + channel, kPixelHalves);
                wmma::mma_sync(sums[side], pixels, high, sums[side]);
                wmma::mma_sync(sums[side], pixels, low, sums[side]);
            }
        }
    }
    __syncthreads();  // the input has been read
    float* results = reinterpret_cast<float*>(shared) + warp * kColumns * kOutStride;
    HISTOSEG_UNROLL
    for (int side = 0; side < kColumns / kSide; ++side) {
        wmma::store_matrix_sync(results + side * kSide * kOutStride, sums[side], kOutStride, wmma::mem_row_major);
    }
    __syncwarp();
    write_results(layer, top + warp, left + lane, results + lane * kOutStride);
}

}  // namespace

const char* launch_unfold(const UnfoldLayer& layer, void* stream) {
    return launch(UnfoldBody{layer}, layer.count, layer.rows(), unfold_pieces(layer), stream);
}

const char* launch_pool(const PoolLayer& layer, void* stream) {
    return launch(PoolBody{layer}, layer.count, layer.height, pool_pieces(layer), stream);
}

const char* launch_spread(const SpreadLayer& layer, void* stream) {
    return launch(SpreadBody{layer}, layer.count, 2 * layer.height, spread_pieces(layer), stream);
}

const char* launch_join(const JoinLayer& layer, void* stream) {
    return launch(JoinBody{layer}, layer.count, layer.height, join_pieces(layer), stream);
}

const char* launch_logits(const LogitsLayer& layer, void* stream) {
    if (layer.count == 0 || layer.height == 0 || layer.width == 0) return nullptr;
    // More than a block gets without asking.
    const cudaError_t status =
        cudaFuncSetAttribute(logits_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return error_text(status);
    const dim3 grid(static_cast<unsigned>((layer.width + kColumns - 1) / kColumns),
                    static_cast<unsigned>((layer.height + kWarps - 1) / kWarps), static_cast<unsigned>(layer.count));
    logits_kernel<<<grid, kBlockThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(layer);
    return error_text(cudaGetLastError());
}

}  // namespace histoseg
