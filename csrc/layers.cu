// Layers of the networks on the device. What a thread of those that only move memory does is in layers_threads.h; the
// first and the last convolution run on the matrix units.
#include <mma.h>

#include "cuda_error.h"
#include "layers_threads.h"

namespace histoseg {

namespace {

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

namespace wmma = nvcuda::wmma;

constexpr int kSide = 16;  // of a fragment
constexpr int kWarps = kBlockThreads / 32;
using Sums = wmma::fragment<wmma::accumulator, kSide, kSide, kSide, float>;
using Left = wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, __half, wmma::row_major>;
using Right = wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, __half, wmma::row_major>;

// Both convolutions cut the output into tiles of kWarps rows, one to a warp, and kColumns pixels. A block does one tile
// after the other, so that it reads the weights once.
constexpr int kColumns = 32, kParts = kColumns / kSide;

struct ConvTile {
    std::int64_t image;
    int top, left;
};

struct ConvTiles {
    int across, down;
    std::int64_t count;

    __host__ __device__ ConvTiles(std::int32_t images, std::int32_t height, std::int32_t width)
        : across((width + kColumns - 1) / kColumns),
          down((height + kWarps - 1) / kWarps),
          count(std::int64_t{images} * across * down) {}
    __device__ ConvTile operator[](std::int64_t i) const {
        return {i / across / down, static_cast<int>(i / across % down) * kWarps, static_cast<int>(i % across) * kColumns};
    }
};

// Weights have rows of kWidth halves; in shared memory 8 more lie between them, so that the rows of a fragment lie in
// different banks.
constexpr int kBetween = 8;

template <int kRows, int kWidth>
__device__ void load_weights(const void* from, char* shared) {
    constexpr int kPieces = kWidth / kPieceChannels;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kBlockThreads) {
        HalfWords words;
        load_16(piece_at(from, i), words);
        store_16(shared + i / kPieces * (kWidth + kBetween) * 2 + i % kPieces * 16, words);
    }
}

template <int kBlocks>
__device__ void clear(Sums (&sums)[kParts][kBlocks]) {
    for (auto& part : sums) {
        for (auto& sum : part) wmma::fill_fragment(sum, 0.0f);
    }
}

// Puts a warp's sums, 16 pixels at a time, into `results` in shared memory, rows kStride apart, where take(left) finds
// those of the pixels from `left` of its row on.
template <int kStride, int kBlocks, typename Take>
__device__ void hand_over(const Sums (&sums)[kParts][kBlocks], float* results, const Take& take) {
    HISTOSEG_UNROLL
    for (int part = 0; part < kParts; ++part) {
        HISTOSEG_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            wmma::store_matrix_sync(results + block * kSide, sums[part][block], kStride, wmma::mem_row_major);
        }
        __syncwarp();
        take(part * kSide);
        __syncwarp();
    }
}

// The first convolution. A pixel has kPixel halves in shared memory, as many as make the step from one output to the
// next 8 halves: so a fragment whose rows are 8 halves apart holds all kernel columns of a kernel row.
template <int kKernel>
struct First {
    static constexpr int kStride = kKernel == 3 ? 1 : 2, kChannels = kKernel == 3 ? 64 : 32;
    static constexpr int kStep = 8, kPixel = kStep / kStride, kReach = kKernel == 3 ? 32 : 16;
    static constexpr int kRows = (kWarps - 1) * kStride + kKernel;
    static constexpr int kPixels = (kColumns - 1) * kStride + kReach / kPixel;
    static constexpr int kRowHalves = (kPixels * kPixel + 15) / 16 * 16;  // fragments begin at multiples of 32 bytes
    static constexpr int kInputBytes = kRows * kRowHalves * 2;
    static constexpr int kWeightRows = kKernel * kReach, kWeightStride = kChannels + kBetween;
    static constexpr int kWeightBytes = kWeightRows * kWeightStride * 2;
    static constexpr int kSumsStride = kChannels + 4;
    static constexpr int kSumsBytes = kSide * kSumsStride * 4;  // of a warp
    static constexpr int kSharedBytes = kWeightBytes + kInputBytes + kWarps * kSumsBytes;
    static constexpr int kBlocksAProcessor = kKernel == 3 ? 2 : 3;  // as its registers allow
    static_assert(kSharedBytes <= 64 << 10, "what every architecture has");
};

template <int kKernel>
__device__ void load_pixels(const FirstLayer& layer, const ConvTile& tile, char* shared) {
    using F = First<kKernel>;
    const int top = tile.top * F::kStride - 1, left = tile.left * F::kStride - 1;
    for (int i = static_cast<int>(threadIdx.x); i < F::kRows * F::kPixels; i += kBlockThreads) {
        const int row = i / F::kPixels, column = i % F::kPixels;
        std::uint32_t words[4] = {};
        HISTOSEG_UNROLL
        for (int c = 0; c < 3; ++c) {
            const std::uint32_t bits = normalised(layer, tile.image, top + row, left + column, c).bits;
            words[c / 2] |= bits << (16 * (c % 2));
        }
        char* to = shared + (row * F::kRowHalves + column * F::kPixel) * 2;
        if constexpr (F::kPixel == 8) {
            store_16(to, words);
        } else {
            *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        }
    }
}

// 16 pixels of all channels, from sums in shared memory: bias, ReLU and rounding. A lane always has the same channels, to
// which `bias` belongs.
template <int kKernel>
__device__ void store_pixels(const FirstLayer& layer, const ConvTile& tile, int row, int left, const float* sums,
                             const float (&bias)[kPieceChannels]) {
    using F = First<kKernel>;
    constexpr int kPieces = F::kChannels / kPieceChannels;
    const int height = layer.height / F::kStride, width = layer.width / F::kStride;
    if (row >= height) return;
    const std::int64_t first = (tile.image * height + row) * width + left;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < kSide * kPieces; i += 32) {
        const int pixel = i / kPieces, channel = i % kPieces * kPieceChannels;
        if (left + pixel >= width) return;
        HalfWords words = {};
        HISTOSEG_UNROLL
        for (int c = 0; c < kPieceChannels; ++c) {
            const float sum = sums[pixel * F::kSumsStride + channel + c] + bias[c];
            words[c / 2] |= static_cast<std::uint32_t>(to_half(sum).bits) << (16 * (c % 2));
        }
        HISTOSEG_UNROLL
        for (int k = 0; k < 4; ++k) words[k] = greater_halves(words[k], 0);
        store_16(piece_at(layer.to, first * kPieces + i), words);
    }
}

template <int kKernel>
__global__ void __launch_bounds__(kBlockThreads, First<kKernel>::kBlocksAProcessor)
    first_kernel(const __grid_constant__ FirstLayer layer) {
    using F = First<kKernel>;
    constexpr int kBlocks = F::kChannels / kSide;
    extern __shared__ __align__(32) char shared[];
    const __half* weights = reinterpret_cast<const __half*>(shared);
    const __half* input = reinterpret_cast<const __half*>(shared + F::kWeightBytes);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    float* results = reinterpret_cast<float*>(shared + F::kWeightBytes + F::kInputBytes + warp * F::kSumsBytes);
    load_weights<F::kWeightRows, F::kChannels>(layer.weights, shared);
    float bias[kPieceChannels];
    HISTOSEG_UNROLL
    for (int c = 0; c < kPieceChannels; ++c) {
        bias[c] = layer.bias[threadIdx.x % (F::kChannels / kPieceChannels) * kPieceChannels + c];
    }
    const ConvTiles tiles(layer.count, layer.height / F::kStride, layer.width / F::kStride);
    for (std::int64_t i = blockIdx.x; i < tiles.count; i += gridDim.x) {
        const ConvTile tile = tiles[i];
        __syncthreads();  // the pixels of the tile before have been read
        load_pixels<kKernel>(layer, tile, shared + F::kWeightBytes);
        __syncthreads();
        Sums sums[kParts][kBlocks];
        clear(sums);
#pragma unroll 1  // as below
        for (int down = 0; down < kKernel; ++down) {
            const __half* row = input + (warp * F::kStride + down) * F::kRowHalves;
            HISTOSEG_UNROLL
            for (int step = 0; step < F::kReach; step += kSide) {
                Left pixels[kParts];
                HISTOSEG_UNROLL
                for (int part = 0; part < kParts; ++part) {
                    wmma::load_matrix_sync(pixels[part], row + step + part * kSide * F::kStep, F::kStep);
                }
                HISTOSEG_UNROLL
                for (int block = 0; block < kBlocks; ++block) {
                    Right right;
                    const int first = (down * F::kReach + step) * F::kWeightStride + block * kSide;
                    wmma::load_matrix_sync(right, weights + first, F::kWeightStride);
                    HISTOSEG_UNROLL
                    for (int part = 0; part < kParts; ++part) {
                        wmma::mma_sync(sums[part][block], pixels[part], right, sums[part][block]);
                    }
                }
            }
        }
        hand_over<F::kSumsStride>(sums, results, [&](int left) {
            store_pixels<kKernel>(layer, tile, tile.top + warp, tile.left + left, results, bias);
        });
    }
}

// The last convolution. kWide: more outputs than fit one fragment beside their weights' second part.
constexpr int kChannels = kLogitsChannels;
constexpr int kInputRows = kWarps + 2, kInputColumns = kColumns + 2;
constexpr int kPixelHalves = kChannels + 16;  // padded: fragments begin at multiples of 32 bytes, and banks differ
constexpr int kInputBytes = kInputRows * kInputColumns * kPixelHalves * 2;

template <bool kWide>
struct Logits {
    static constexpr int kWidth = kWide ? 2 * kSide : kSide;
    static constexpr int kSumsStride = kWidth + 4;
    static constexpr int kWeightRows = 9 * kChannels, kWeightStride = kWidth + kBetween;
    static constexpr int kWeightBytes = kWeightRows * kWeightStride * 2;
    static constexpr int kSumsBytes = kSide * kSumsStride * 4;  // of a warp
    static constexpr int kSharedBytes = kWeightBytes + kInputBytes;
    static constexpr int kBlocksAProcessor = kWide ? 3 : 4;  // as shared memory and registers allow
    static_assert(kWarps * kSumsBytes <= kInputBytes, "sums lie where the input was");
    static_assert(kSharedBytes <= 64 << 10, "what every architecture has");
};

__device__ void load_channels(const LogitsLayer& layer, const ConvTile& tile, char* shared) {
    constexpr int kPieces = kChannels / kPieceChannels;
    for (int i = static_cast<int>(threadIdx.x); i < kInputRows * kInputColumns * kPieces; i += kBlockThreads) {
        const int part = i % kPieces, pixel = i / kPieces;
        const int y = tile.top - 1 + pixel / kInputColumns, x = tile.left - 1 + pixel % kInputColumns;
        HalfWords words = {};
        if (y >= 0 && y < layer.height && x >= 0 && x < layer.width) {
            load_16(piece_at(layer.from, ((tile.image * layer.height + y) * layer.width + x) * kPieces + part), words);
        }
        store_16(shared + pixel * kPixelHalves * 2 + part * 16, words);
    }
}

// One logit of a pixel: the two parts of its weights' products, and the bias.
template <bool kWide>
__device__ float logit(const LogitsLayer& layer, const float* sums, int output) {
    return sums[output] + sums[Logits<kWide>::kWidth / 2 + output] + layer.bias[output];
}

// 16 pixels: half of the warp writes the even outputs (with a shuffle: the upper rows), half the others.
template <bool kWide>
__device__ void store_logits(const LogitsLayer& layer, const ConvTile& tile, int y, int left, const float* results) {
    const int lane = static_cast<int>(threadIdx.x) % 32, half = lane / kSide, x = left + lane % kSide;
    if (y >= layer.height || x >= layer.width) return;
    const float* sums = results + lane % kSide * Logits<kWide>::kSumsStride;
    const std::int64_t width = std::int64_t{layer.width} * layer.shuffle;
    const std::int64_t height = std::int64_t{layer.height} * layer.shuffle;
    const int classes = layer.outputs / (layer.shuffle * layer.shuffle);
    float* to = layer.to + tile.image * classes * height * width;
    if (layer.shuffle == 1) {
        for (int c = half; c < classes; c += 2) to[(c * height + y) * width + x] = logit<kWide>(layer, sums, c);
        return;
    }
    for (int c = 0; c < classes; ++c) {
        const int first = 4 * c + 2 * half;
        const float2 pair = {logit<kWide>(layer, sums, first), logit<kWide>(layer, sums, first + 1)};
        *reinterpret_cast<float2*>(to + (c * height + 2 * y + half) * width + 2 * x) = pair;
    }
}

template <bool kWide>
__global__ void __launch_bounds__(kBlockThreads, Logits<kWide>::kBlocksAProcessor)
    logits_kernel(const __grid_constant__ LogitsLayer layer) {
    using L = Logits<kWide>;
    constexpr int kBlocks = L::kWidth / kSide;
    extern __shared__ __align__(32) char shared[];
    const __half* weights = reinterpret_cast<const __half*>(shared);
    const __half* input = reinterpret_cast<const __half*>(shared + L::kWeightBytes);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    float* results = reinterpret_cast<float*>(shared + L::kWeightBytes + warp * L::kSumsBytes);
    load_weights<L::kWeightRows, L::kWidth>(layer.weights, shared);
    const ConvTiles tiles(layer.count, layer.height, layer.width);
    for (std::int64_t i = blockIdx.x; i < tiles.count; i += gridDim.x) {
        const ConvTile tile = tiles[i];
        __syncthreads();  // the sums of the tile before have been read
        load_channels(layer, tile, shared + L::kWeightBytes);
        __syncthreads();
        Sums sums[kParts][kBlocks];
        clear(sums);
#pragma unroll 1  // unrolled, it would take the registers of two blocks
        for (int tap = 0; tap < 9; ++tap) {
            const __half* row = input + ((warp + tap / 3) * kInputColumns + tap % 3) * kPixelHalves;
            HISTOSEG_UNROLL
            for (int channel = 0; channel < kChannels; channel += kSide) {
                Right right[kBlocks];
                HISTOSEG_UNROLL
                for (int block = 0; block < kBlocks; ++block) {
                    const int first = (tap * kChannels + channel) * L::kWeightStride + block * kSide;
                    wmma::load_matrix_sync(right[block], weights + first, L::kWeightStride);
                }
                HISTOSEG_UNROLL
                for (int part = 0; part < kParts; ++part) {
                    Left pixels;
                    wmma::load_matrix_sync(pixels, row + part * kSide * kPixelHalves + channel, kPixelHalves);
                    HISTOSEG_UNROLL
                    for (int block = 0; block < kBlocks; ++block) {
                        wmma::mma_sync(sums[part][block], pixels, right[block], sums[part][block]);
                    }
                }
            }
        }
        __syncthreads();  // the pixels have been read
        hand_over<L::kSumsStride>(sums, results, [&](int left) {
            store_logits<kWide>(layer, tile, tile.top + warp, tile.left + left, results);
        });
    }
}

// As many blocks as the device runs at a time, each with `shared` bytes of shared memory, which may be more than a block
// gets without asking.
template <typename Layer>
const char* launch_conv(void (*kernel)(Layer), const Layer& layer, const ConvTiles& tiles, int shared, void* stream) {
    if (tiles.count == 0) return nullptr;
    int device = 0, processors = 0, blocks = 0;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess) status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const auto threads = static_cast<int>(kBlockThreads);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    if (status != cudaSuccess) return error_text(status);
    const std::int64_t most = std::int64_t{processors} * (blocks > 0 ? blocks : 1);
    const dim3 grid(static_cast<unsigned>(tiles.count < most ? tiles.count : most));
    kernel<<<grid, kBlockThreads, shared, static_cast<cudaStream_t>(stream)>>>(layer);
    return error_text(cudaGetLastError());
}

}  // namespace

const char* launch_first(const FirstLayer& layer, void* stream) {
    const ConvTiles tiles(layer.count, layer.height / layer.stride(), layer.width / layer.stride());
    if (layer.kernel == 3) return launch_conv(first_kernel<3>, layer, tiles, First<3>::kSharedBytes, stream);
    return launch_conv(first_kernel<4>, layer, tiles, First<4>::kSharedBytes, stream);
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
    const ConvTiles tiles(layer.count, layer.height, layer.width);
    if (layer.columns() == 2 * kSide) {
        return launch_conv(logits_kernel<true>, layer, tiles, Logits<true>::kSharedBytes, stream);
    }
    return launch_conv(logits_kernel<false>, layer, tiles, Logits<false>::kSharedBytes, stream);
}

}  // namespace histoseg
