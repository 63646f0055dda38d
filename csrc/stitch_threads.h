// What one thread of the stitch kernel does: pieces of a core's rows, a few pixels each, read with 16-byte loads
// where the batch's alignment allows, else value by value.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_threads.h"
#include "half.h"
#include "stitch.h"
#include "stitch_pixel.h"

namespace histoseg {

// One build of the kernel. kFixed is the number of classes if the pixel code is written out for it: then a piece is
// kPixels pixels, loaded 16 bytes at a time. Else it is 0 and a piece one pixel, whose values still lie beside those
// of the warp's other pixels.
template <int kFixed>
struct StitchVariant {
    static constexpr int kFixedClasses = kFixed;
    static constexpr int kSlots = kFixed > 0 ? kFixed : kMaxClasses;
    static constexpr int kPixels = kFixed > 0 ? 8 : 1;
    static constexpr int kSums = 2 * kSlots + 1;
};

// Calls run(StitchVariant<...>{}) with the one for the batch.
template <typename Run>
auto with_variant(const StitchBatch& batch, const Run& run) {
    switch (batch.classes) {
        case 2: return run(StitchVariant<2>{});
        case 3: return run(StitchVariant<3>{});
        case 4: return run(StitchVariant<4>{});
        default: return run(StitchVariant<0>{});
    }
}

// What a thread has seen of its tile: by class pixels, then by class confidence, then pixels that are not finite.
template <typename Variant>
struct StitchSums {
    std::uint32_t values[Variant::kSums] = {};
};

// A row of one pixel counts for up to three pieces (see stitch_blocks), and a piece has up to 8 pixels.
static_assert((3 * kMaxTilePixels / (std::int64_t{kMaxBlocksATile} * kBlockThreads) + 1) * 8 * kConfidenceUnits <=
                  0xFFFFFFFFll,
              "a thread's confidence is summed in 32 bits");

// Where the k-th of a thread's sums is added up; null for classes that there are not.
template <typename Variant>
HISTOSEG_INLINE unsigned long long* stitch_total(const StitchBatch& batch, std::uint32_t tile, int k) {
    if (k == 2 * Variant::kSlots) return batch.nonfinite + tile;
    const int c = k % Variant::kSlots;
    if (c >= batch.classes) return nullptr;
    return (k < Variant::kSlots ? batch.counts : batch.confidence) + std::int64_t{tile} * batch.classes + c;
}

struct StitchCore {
    std::int32_t top, left, bottom, right;
};

// The part of the core that lies in the tile: a wrong core must not reach other memory.
HISTOSEG_INLINE StitchCore core_in_tile(const StitchBatch& batch, std::uint32_t tile) {
    const std::int32_t* core = batch.cores + 4 * std::int64_t{tile};
    const std::int32_t top = greater(core[0], 0), left = greater(core[1], 0);
    return {top, left, greater(lesser(core[2], batch.height), top), greater(lesser(core[3], batch.width), left)};
}

// Enough for the largest core: where cores are is known on the device only.
template <typename Variant>
std::uint32_t stitch_blocks(const StitchBatch& batch) {
    return blocks_a_tile(std::int64_t{batch.height} * (batch.width / Variant::kPixels + 2));
}

// Pixels x .. x + kPixels of a tile's row; those from `first` to `last` (excluded, relative to x) are in the core.
struct StitchPiece {
    std::int64_t row;  // the row's first pixel in the batch
    std::uint32_t tile;
    std::int32_t y, x, first, last;
};

template <typename Variant>
struct StitchPixels {
    float values[Variant::kPixels][Variant::kSlots];
};

// Where the values of a piece's first pixel lie: class c of pixel i is at first + c * next_class + i * next_pixel.
struct LogitsPlace {
    std::int64_t first, next_class;
    std::int32_t next_pixel;
};

HISTOSEG_INLINE LogitsPlace logits_place(const StitchBatch& batch, const StitchPiece& piece) {
    if (batch.layout == LogitsLayout::nhwc) return {(piece.row + piece.x) * batch.classes, 1, batch.classes};
    const std::int64_t plane = std::int64_t{batch.height} * batch.width;
    const std::int64_t planes_before = std::int64_t{piece.tile} * (batch.classes - 1);
    return {piece.row + piece.x + planes_before * plane, plane, 1};
}

// The i-th value in 16 bytes of them.
HISTOSEG_INLINE float value_in(const std::uint32_t (&words)[4], int i, float) { return bits_float(words[i]); }

HISTOSEG_INLINE float value_in(const std::uint32_t (&words)[4], int i, Half) {
    return to_float(Half{static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)))});
}

// For pieces whose place in the batch is a multiple of kPixels, if that makes them aligned in every class.
template <typename Variant, typename Logit>
HISTOSEG_INLINE void load_vectors(const StitchBatch& batch, const StitchPiece& piece, StitchPixels<Variant>& pixels) {
    constexpr int kSlots = Variant::kSlots, kValues = 16 / static_cast<int>(sizeof(Logit));
    constexpr int kParts = Variant::kPixels / kValues;
    const LogitsPlace place = logits_place(batch, piece);
    const Logit* logits = static_cast<const Logit*>(batch.logits) + place.first;
    HISTOSEG_UNROLL
    for (int k = 0; k < kSlots * kParts; ++k) {
        std::uint32_t words[4];
        if (batch.layout == LogitsLayout::nchw) {
            const int c = k / kParts, pixel = k % kParts * kValues;
            load_16(logits + c * place.next_class + pixel, words);
            HISTOSEG_UNROLL
            for (int i = 0; i < kValues; ++i) pixels.values[pixel + i][c] = value_in(words, i, Logit{});
        } else {
            const int value = k * kValues;
            load_16(logits + value, words);
            HISTOSEG_UNROLL
            for (int i = 0; i < kValues; ++i) {
                pixels.values[(value + i) / kSlots][(value + i) % kSlots] = value_in(words, i, Logit{});
            }
        }
    }
}

// For any piece: value by value, and only what is in the core.
template <typename Variant, typename Logit>
HISTOSEG_INLINE void load_values(const StitchBatch& batch, const StitchPiece& piece, StitchPixels<Variant>& pixels) {
    const LogitsPlace place = logits_place(batch, piece);
    const Logit* logits = static_cast<const Logit*>(batch.logits) + place.first;
    HISTOSEG_UNROLL
    for (int i = 0; i < Variant::kPixels; ++i) {
        HISTOSEG_UNROLL
        for (int c = 0; c < Variant::kSlots; ++c) {
            const bool there = i >= piece.first && i < piece.last && c < batch.classes;
            pixels.values[i][c] = there ? to_float(logits[c * place.next_class + i * place.next_pixel]) : 0.0f;
        }
    }
}

template <typename Variant, typename Logit>
HISTOSEG_INLINE void load_piece(const StitchBatch& batch, const StitchPiece& piece, StitchPixels<Variant>& pixels) {
    if constexpr (Variant::kFixedClasses > 0) {
        // A piece may reach into the rows beside its own, but not past the tile: there the memory may end.
        const std::int32_t tile_pixels = batch.height * batch.width;
        const bool in_tile = piece.y * batch.width + piece.x + Variant::kPixels <= tile_pixels;
        // With channels apart, a class begins where the one before it ends.
        const bool same_in_all = batch.layout == LogitsLayout::nhwc || tile_pixels % (16 / sizeof(Logit)) == 0;
        if (in_tile && same_in_all && is_aligned(batch.logits, 16)) {
            load_vectors<Variant, Logit>(batch, piece, pixels);
            return;
        }
    }
    load_values<Variant, Logit>(batch, piece, pixels);
}

// The same sums in the same order as stitch.cpp's.
template <typename Variant>
HISTOSEG_INLINE PixelScore score_of(const StitchBatch& batch, const float (&values)[Variant::kSlots]) {
    if constexpr (Variant::kFixedClasses > 0) {
        return score_pixel<Variant::kFixedClasses>(values[0], values[1], values[Variant::kSlots > 2 ? 2 : 0],
                                                   values[Variant::kSlots > 3 ? 3 : 0]);
    } else {
        float top = values[0], sum = 0.0f;
        std::uint32_t winner = 0, bad = nonfinite_mask(values[0]);
        HISTOSEG_UNROLL
        for (int c = 1; c < Variant::kSlots; ++c) {
            if (c < batch.classes) challenge(values[c], static_cast<std::uint32_t>(c), top, winner, bad);
        }
        HISTOSEG_UNROLL
        for (int c = 0; c < Variant::kSlots; ++c) {
            if (c < batch.classes) sum += exp_not_positive(values[c] - top);
        }
        return settle(winner, top, sum, bad);
    }
}

// Bytes of a piece's pixels, the first in the lowest bits.
template <typename Variant>
using PieceBytes = std::conditional_t<Variant::kPixels == 8, std::uint64_t, std::uint32_t>;

// Writes those of a piece's bytes that are in the core.
template <typename Variant>
HISTOSEG_INLINE void store_piece(const StitchPiece& piece, PieceBytes<Variant> bytes, std::uint8_t* to) {
    if constexpr (Variant::kPixels > 1) {
        if (piece.first == 0 && piece.last == Variant::kPixels && is_aligned(to, Variant::kPixels)) {
            store_word(to, bytes);
            return;
        }
    }
    HISTOSEG_UNROLL
    for (int i = 0; i < Variant::kPixels; ++i) {
        if (i >= piece.first && i < piece.last) to[i] = static_cast<std::uint8_t>(bytes >> (8 * i));
    }
}

template <typename Variant>
HISTOSEG_INLINE void store_probabilities(const StitchBatch& batch, const StitchPiece& piece,
                                         const StitchPixels<Variant>& pixels,
                                         const PixelScore (&scores)[Variant::kPixels]) {
    HISTOSEG_UNROLL
    for (int c = 0; c < Variant::kSlots; ++c) {
        if (Variant::kFixedClasses == 0 && c >= batch.classes) continue;
        PieceBytes<Variant> bytes = 0;
        HISTOSEG_UNROLL
        for (int i = 0; i < Variant::kPixels; ++i) {
            const std::uint8_t byte = probability_byte(pixels.values[i][c], scores[i].top, scores[i].scale);
            bytes |= PieceBytes<Variant>{byte} << (8 * i);
        }
        const std::int64_t plane = std::int64_t{piece.tile} * batch.classes + c;
        const std::int64_t at = (plane * batch.height + piece.y) * batch.width + piece.x;
        store_piece<Variant>(piece, bytes, batch.probabilities + at);
    }
}

template <typename Variant>
HISTOSEG_INLINE void stitch_piece(const StitchBatch& batch, const StitchPiece& piece, std::uint8_t* ids,
                                  StitchSums<Variant>& sums) {
    constexpr int kSlots = Variant::kSlots;
    StitchPixels<Variant> pixels;
    if (batch.type == LogitsType::fp32) {
        load_piece<Variant, float>(batch, piece, pixels);
    } else {
        load_piece<Variant, Half>(batch, piece, pixels);
    }
    PixelScore scores[Variant::kPixels];
    PieceBytes<Variant> bytes = 0;
    HISTOSEG_UNROLL
    for (int i = 0; i < Variant::kPixels; ++i) {
        scores[i] = score_of<Variant>(batch, pixels.values[i]);
        bytes |= PieceBytes<Variant>{scores[i].winner} << (8 * i);
        if (i < piece.first || i >= piece.last) continue;
        const std::uint32_t units = confidence_units(scores[i].scale);
        HISTOSEG_UNROLL
        for (int c = 0; c < kSlots; ++c) {
            const bool won = scores[i].winner == static_cast<std::uint32_t>(c);
            sums.values[c] += won ? 1u : 0u;
            sums.values[kSlots + c] += won ? units : 0u;
        }
        sums.values[2 * kSlots] += scores[i].scale == 0.0f ? 1u : 0u;
    }
    store_piece<Variant>(piece, bytes, ids);
    if (batch.probabilities) store_probabilities<Variant>(batch, piece, pixels, scores);
}

// All of a thread's pieces; adds what it saw to `sums`.
template <typename Variant>
HISTOSEG_INLINE void stitch_thread(const StitchBatch& batch, const ThreadPlace& place, StitchSums<Variant>& sums) {
    constexpr std::int32_t kPixels = Variant::kPixels;
    const StitchCore core = core_in_tile(batch, place.tile);
    // A row whose core does not begin at a multiple of kPixels lies in one piece more.
    const std::uint32_t row_pieces =
        core.right > core.left ? static_cast<std::uint32_t>((core.right - core.left + kPixels - 1) / kPixels + 1) : 0;
    const std::uint32_t pieces = row_pieces * static_cast<std::uint32_t>(core.bottom - core.top);
    for (std::uint32_t k = place.first(); k < pieces; k += place.step()) {
        StitchPiece piece;
        piece.tile = place.tile;
        piece.y = core.top + static_cast<std::int32_t>(k / row_pieces);
        piece.row = (std::int64_t{place.tile} * batch.height + piece.y) * batch.width;
        const std::int32_t before = static_cast<std::int32_t>((piece.row + core.left) % kPixels);
        piece.x = core.left - before + static_cast<std::int32_t>(k % row_pieces) * kPixels;
        piece.first = greater(core.left - piece.x, 0);
        piece.last = lesser(core.right - piece.x, kPixels);
        if (piece.first >= piece.last) continue;
        std::uint8_t* ids = batch.ids + piece.row + piece.x;
        if (batch.targets) {
            const StitchTarget target = batch.targets[place.tile];
            ids = target.classes + (piece.y - batch.cores[4 * std::int64_t{place.tile}]) * target.stride_y + piece.x -
                  batch.cores[4 * std::int64_t{place.tile} + 1];
        }
        stitch_piece<Variant>(batch, piece, ids, sums);
    }
}

}  // namespace histoseg
