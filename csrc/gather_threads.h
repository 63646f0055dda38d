// What one thread of the gather kernel does: pieces of tile rows, 16 bytes each and aligned in the tile.
#pragma once

#include <cstdint>

#include "cuda_threads.h"
#include "gather.h"

namespace histoseg {

// Where pixel i of an axis lies in an image of `length` pixels; reflect_indices of tiling.py.
HISTOSEG_INLINE std::uint32_t reflected(std::uint32_t i, std::uint32_t length) {
    if (i < length) return i;
    const std::uint32_t period = length > 1 ? 2 * (length - 1) : 1;
    const std::uint32_t back = i % period;
    return back < period - back ? back : period - back;
}

// A row that does not begin at a multiple of 16 bytes lies in one piece more.
HISTOSEG_INLINE std::uint32_t gather_pieces_a_row(std::int32_t width) {
    return (3 * static_cast<std::uint32_t>(width) + 15) / 16 + 1;
}

inline std::uint32_t gather_blocks(const GatherBatch& batch) {
    return blocks_a_tile(std::int64_t{gather_pieces_a_row(batch.width)} * batch.height);
}

// `to` is aligned to 16 bytes; `from` is read in the largest units that its own alignment allows.
HISTOSEG_INLINE void copy_16(const std::uint8_t* from, std::uint8_t* to) {
    std::uint32_t words[4];
    if (is_aligned(from, 16)) {
        load_16(from, words);
    } else if (is_aligned(from, 4)) {
        HISTOSEG_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = load_4(from + 4 * i);
    } else {
        HISTOSEG_UNROLL
        for (int i = 0; i < 4; ++i) {
            words[i] = static_cast<std::uint32_t>(from[4 * i]) | static_cast<std::uint32_t>(from[4 * i + 1]) << 8 |
                       static_cast<std::uint32_t>(from[4 * i + 2]) << 16 |
                       static_cast<std::uint32_t>(from[4 * i + 3]) << 24;
        }
    }
    store_16(to, words);
}

HISTOSEG_INLINE void gather_thread(const GatherBatch& batch, const ThreadPlace& place) {
    const std::uint32_t row_pieces = gather_pieces_a_row(batch.width);
    const std::uint32_t pieces = row_pieces * static_cast<std::uint32_t>(batch.height);
    const std::uint32_t origin_y = static_cast<std::uint32_t>(batch.origins[2 * place.tile]);
    const std::uint32_t origin_x = static_cast<std::uint32_t>(batch.origins[2 * place.tile + 1]);
    const std::uint32_t image_height = static_cast<std::uint32_t>(batch.image_height);
    const std::uint32_t image_width = static_cast<std::uint32_t>(batch.image_width);
    const std::int32_t row_bytes = 3 * batch.width;
    for (std::uint32_t piece = place.first(); piece < pieces; piece += place.step()) {
        const std::uint32_t y = piece / row_pieces;
        std::uint8_t* row = batch.tiles + (std::int64_t{place.tile} * batch.height + y) * row_bytes;
        const std::uint8_t* source = batch.image + reflected(origin_y + y, image_height) * batch.image_stride;
        const std::int32_t before = static_cast<std::int32_t>(reinterpret_cast<std::uintptr_t>(row) % 16);
        const std::int32_t begin = static_cast<std::int32_t>(piece % row_pieces) * 16 - before;
        const std::int32_t first = greater(begin, 0), last = lesser(begin + 16, row_bytes);
        const bool whole = last - first == 16;
        if (whole && 3 * std::int64_t{origin_x} + last <= 3 * std::int64_t{image_width}) {
            copy_16(source + 3 * std::int64_t{origin_x} + begin, row + begin);
            continue;
        }
        for (std::int32_t at = first; at < last; ++at) {
            const std::uint32_t x = reflected(origin_x + static_cast<std::uint32_t>(at) / 3, image_width);
            row[at] = source[3 * std::int64_t{x} + at % 3];
        }
    }
}

}  // namespace histoseg
