// What CUDA kernels over batches of tiles have in common. Their bodies are plain functions of a thread's place, so
// that a test can run a whole launch as loops on a machine without a GPU; the .cu files add what only a GPU has.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "host_device.h"

namespace histoseg {

constexpr std::uint32_t kBlockThreads = 256;
constexpr std::uint32_t kMaxBlocksATile = 1024;
constexpr std::uint32_t kWorkAThread = 4;
// The limit of a grid's second axis.
constexpr std::int64_t kMaxTiles = 65535;
// Twice this and more still fits 32 bits: a thread's arithmetic on places within a tile.
constexpr std::int64_t kMaxTilePixels = std::int64_t{1} << 28;

// A thread in a grid of `blocks` x tiles, kBlockThreads each: it does pieces first(), first() + step(), ... of a tile.
struct ThreadPlace {
    std::uint32_t tile, block, thread, blocks;

    HISTOSEG_INLINE std::uint32_t first() const { return block * kBlockThreads + thread; }
    HISTOSEG_INLINE std::uint32_t step() const { return blocks * kBlockThreads; }
};

// Blocks for at most `pieces` pieces of work in each tile.
inline std::uint32_t blocks_a_tile(std::int64_t pieces) {
    const std::int64_t a_block = std::int64_t{kBlockThreads} * kWorkAThread;
    const std::int64_t wanted = (pieces + a_block - 1) / a_block;
    return static_cast<std::uint32_t>(wanted < 1 ? 1 : wanted < kMaxBlocksATile ? wanted : kMaxBlocksATile);
}

HISTOSEG_INLINE std::int32_t lesser(std::int32_t a, std::int32_t b) { return a < b ? a : b; }
HISTOSEG_INLINE std::int32_t greater(std::int32_t a, std::int32_t b) { return a > b ? a : b; }

HISTOSEG_INLINE bool is_aligned(const void* pointer, std::uint32_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// A GPU traps on what is not aligned; the host, which would do it, must not hide that from tests.
inline void check_aligned(const void* pointer, std::uint32_t bytes) {
    if (!is_aligned(pointer, bytes)) throw std::logic_error("a vector access is not aligned");
}

// 16 or 4 bytes from an address aligned to as many, which nobody writes to meanwhile, in one load.
HISTOSEG_INLINE void load_16(const void* from, std::uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
    const uint4 loaded = __ldg(static_cast<const uint4*>(from));
    words[0] = loaded.x;
    words[1] = loaded.y;
    words[2] = loaded.z;
    words[3] = loaded.w;
#else
    check_aligned(from, 16);
    std::memcpy(words, from, 16);
#endif
}

HISTOSEG_INLINE std::uint32_t load_4(const void* from) {
#if defined(__CUDA_ARCH__)
    return __ldg(static_cast<const std::uint32_t*>(from));
#else
    check_aligned(from, 4);
    std::uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
#endif
}

HISTOSEG_INLINE void store_16(void* to, const std::uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#else
    check_aligned(to, 16);
    std::memcpy(to, words, 16);
#endif
}

// One integer to an address aligned to its size, in one store.
template <typename Word>
HISTOSEG_INLINE void store_word(void* to, Word word) {
#if defined(__CUDA_ARCH__)
    *static_cast<Word*>(to) = word;
#else
    check_aligned(to, sizeof word);
    std::memcpy(to, &word, sizeof word);
#endif
}

}  // namespace histoseg
