// What one thread of the layers' kernels does: 16 bytes of the output, eight channels of a pixel.
#pragma once

#include <cstdint>

#include "cuda_threads.h"
#include "half.h"
#include "layers.h"

namespace histoseg {

constexpr std::int32_t kPieceChannels = 8;

// The `piece`-th 16 bytes of a row of the output.
struct LayerPlace {
    std::uint32_t tile, row, piece;
};

// Eight halves, as the words that memory holds.
using HalfWords = std::uint32_t[4];

HISTOSEG_INLINE const char* piece_at(const void* base, std::int64_t index) {
    return static_cast<const char*>(base) + 16 * index;
}

HISTOSEG_INLINE char* piece_at(void* base, std::int64_t index) { return static_cast<char*>(base) + 16 * index; }

constexpr std::uint32_t kSigns = 0x80008000u, kNoSigns = ~kSigns;  // of the two halves in a word

// What a ReLU makes of two halves: NaN stays NaN, and loses its sign.
HISTOSEG_INLINE std::uint32_t relu_halves(std::uint32_t word) {
    const std::uint32_t sizes = word & kNoSigns;
    const std::uint32_t nans = (sizes + 0x03FF03FFu) & kSigns;  // sizes over that of infinity, 0x7C00, reach the sign's bit
    const std::uint32_t below = word & kSigns & ~nans;
    return sizes & ~((below >> 15) * 0xFFFFu);
}

// The larger halves of two words, as integers: of halves without a sign, NaNs above all, the order is that of the numbers.
HISTOSEG_INLINE std::uint32_t greater_halves(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __vmaxs2(a, b);
#else
    std::uint32_t most = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto x = static_cast<std::int16_t>(a >> shift), y = static_cast<std::int16_t>(b >> shift);
        most |= static_cast<std::uint32_t>(static_cast<std::uint16_t>(x > y ? x : y)) << shift;
    }
    return most;
#endif
}

// What the first convolution reads of a pixel: nothing of what lies outside the image.
HISTOSEG_INLINE Half normalised(const FirstLayer& layer, std::int64_t tile, std::int32_t y, std::int32_t x, std::int32_t c) {
    if (y < 0 || y >= layer.height || x < 0 || x >= layer.width) return {0};
    const std::int64_t pixel = (tile * layer.height + y) * layer.width + x;
    const float scale = c == 0 ? layer.scale[0] : c == 1 ? layer.scale[1] : layer.scale[2];
    const float shift = c == 0 ? layer.shift[0] : c == 1 ? layer.shift[1] : layer.shift[2];
    return to_half(static_cast<float>(layer.rgb[3 * pixel + c]) * scale + shift);
}

inline std::int64_t pool_pieces(const PoolLayer& layer) {
    return std::int64_t{layer.width} * layer.channels / kPieceChannels;
}

HISTOSEG_INLINE void pool_thread(const PoolLayer& layer, const LayerPlace& place) {
    const std::int32_t pieces = layer.channels / kPieceChannels;
    const std::int64_t row = std::int64_t{place.tile} * layer.height + place.row;
    const std::int64_t row_pieces = std::int64_t{layer.width} * pieces;
    const auto x = static_cast<std::int32_t>(place.piece) / pieces, part = static_cast<std::int32_t>(place.piece) % pieces;
    const std::int64_t first = 4 * row * row_pieces + 2 * std::int64_t{x} * pieces + part;
    HalfWords corners[4];
    HISTOSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
        load_16(piece_at(layer.from, first + i / 2 * 2 * row_pieces + i % 2 * std::int64_t{pieces}), corners[i]);
        HISTOSEG_UNROLL
        for (int k = 0; k < 4; ++k) corners[i][k] &= kNoSigns;
    }
    HalfWords most;
    HISTOSEG_UNROLL
    for (int k = 0; k < 4; ++k) {
        most[k] = greater_halves(greater_halves(corners[0][k], corners[1][k]),
                                 greater_halves(corners[2][k], corners[3][k]));
    }
    store_16(piece_at(layer.to, row * row_pieces + place.piece), most);
}

inline std::int64_t spread_pieces(const SpreadLayer& layer) {
    return 2 * std::int64_t{layer.width} * layer.channels / kPieceChannels;
}

HISTOSEG_INLINE void spread_thread(const SpreadLayer& layer, const LayerPlace& place) {
    const std::int32_t pieces = layer.channels / kPieceChannels;
    const auto x = static_cast<std::int32_t>(place.piece) / pieces, part = static_cast<std::int32_t>(place.piece) % pieces;
    const std::int64_t from_row = std::int64_t{place.tile} * layer.height + place.row / 2;
    const std::int64_t pixel = from_row * layer.width + x / 2;
    HalfWords words;
    load_16(piece_at(layer.from, (4 * pixel + 2 * (place.row % 2) + x % 2) * pieces + part), words);
    HISTOSEG_UNROLL
    for (int k = 0; k < 4; ++k) words[k] = relu_halves(words[k]);
    const std::int64_t row = 2 * std::int64_t{place.tile} * layer.height + place.row;
    store_16(piece_at(layer.to, row * 2 * layer.width * pieces + place.piece), words);
}

inline std::int64_t join_pieces(const JoinLayer& layer) {
    return std::int64_t{layer.width} * layer.channels / kPieceChannels;
}

HISTOSEG_INLINE void join_thread(const JoinLayer& layer, const LayerPlace& place) {
    const std::int32_t pieces = layer.channels / kPieceChannels;
    const auto x = static_cast<std::int32_t>(place.piece) / pieces, part = static_cast<std::int32_t>(place.piece) % pieces;
    const std::int64_t low_row = std::int64_t{place.tile} * (layer.height / 2) + place.row / 2;
    HalfWords low, sums;
    load_16(piece_at(layer.low, (low_row * (layer.width / 2) + x / 2) * pieces + part), low);
    const std::int64_t row = std::int64_t{place.tile} * layer.height + place.row;
    const std::int64_t at = row * layer.width * pieces + place.piece;
    load_16(piece_at(layer.skip, at), sums);
    HISTOSEG_UNROLL
    for (int k = 0; k < 4; ++k) {
        std::uint32_t sum = 0;
        HISTOSEG_UNROLL
        for (int shift = 0; shift < 32; shift += 16) {
            const float a = to_float(Half{static_cast<std::uint16_t>(low[k] >> shift)});
            const float b = to_float(Half{static_cast<std::uint16_t>(sums[k] >> shift)});
            sum |= static_cast<std::uint32_t>(to_half(a + b).bits) << shift;
        }
        sums[k] = greater_halves(sum, 0);
    }
    store_16(piece_at(layer.to, at), sums);
}

}  // namespace histoseg
