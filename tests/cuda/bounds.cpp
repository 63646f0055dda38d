// Runs the kernels' threads on memory that ends where its arrays do: built with AddressSanitizer by test_bounds.py.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "gather_threads.h"
#include "layers_threads.h"
#include "stitch_threads.h"

using namespace histoseg;

namespace {

std::mt19937 random_bits(1);

std::int32_t pick(std::int32_t least, std::int32_t most) {
    return least + static_cast<std::int32_t>(random_bits() % static_cast<std::uint32_t>(most - least + 1));
}

// A heap block of its own: the sanitizer sees the first byte before and after it.
template <typename T>
std::unique_ptr<T[]> exactly(std::int64_t count) {
    return std::make_unique<T[]>(static_cast<std::size_t>(count));
}

template <typename Body>
void for_each_thread(std::int32_t tiles, std::uint32_t blocks, const Body& body) {
    for (std::uint32_t tile = 0; tile < static_cast<std::uint32_t>(tiles); ++tile) {
        for (std::uint32_t block = 0; block < blocks; ++block) {
            for (std::uint32_t thread = 0; thread < kBlockThreads; ++thread) {
                body(ThreadPlace{tile, block, thread, blocks});
            }
        }
    }
}

struct RunStitch {
    const StitchBatch& batch;

    template <typename Variant>
    void operator()(Variant) const {
        for_each_thread(batch.count, stitch_blocks<Variant>(batch), [&](const ThreadPlace& place) {
            StitchSums<Variant> sums;
            stitch_thread<Variant>(batch, place, sums);
        });
    }
};

// A random part of [0, length), often all of it.
void pick_span(std::int32_t length, std::int32_t& begin, std::int32_t& end) {
    begin = pick(0, 1) ? 0 : pick(0, length);
    end = pick(0, 1) ? length : pick(begin, length);
}

void stitch_once() {
    StitchBatch batch{};
    batch.count = pick(1, 2);
    batch.classes = pick(1, 6);
    batch.height = pick(1, 9);
    batch.width = pick(0, 1) ? 4 * pick(1, 12) : pick(1, 50);
    batch.type = pick(0, 1) ? LogitsType::fp16 : LogitsType::fp32;
    batch.layout = pick(0, 1) ? LogitsLayout::nhwc : LogitsLayout::nchw;
    const std::int64_t pixels = std::int64_t{batch.count} * batch.height * batch.width;
    const auto logits = exactly<std::uint8_t>(pixels * batch.classes * (batch.type == LogitsType::fp16 ? 2 : 4));
    const auto cores = exactly<std::int32_t>(4 * batch.count);
    for (std::int32_t i = 0; i < batch.count; ++i) {
        pick_span(batch.height, cores[4 * i], cores[4 * i + 2]);
        pick_span(batch.width, cores[4 * i + 1], cores[4 * i + 3]);
    }
    const auto ids = exactly<std::uint8_t>(pixels);
    const auto probabilities = exactly<std::uint8_t>(pixels * batch.classes);
    batch.logits = logits.get();
    batch.cores = cores.get();
    batch.ids = ids.get();
    batch.probabilities = pick(0, 1) ? probabilities.get() : nullptr;
    with_variant(batch, RunStitch{batch});
}

void gather_once() {
    GatherBatch batch{};
    batch.image_height = pick(1, 30);
    batch.image_width = pick(1, 60);
    batch.image_stride = 3 * batch.image_width + pick(0, 4);
    batch.count = pick(1, 2);
    batch.height = pick(1, 9);
    batch.width = pick(1, 50);
    const auto image = exactly<std::uint8_t>((batch.image_height - 1) * batch.image_stride + 3 * batch.image_width);
    const auto origins = exactly<std::int32_t>(2 * batch.count);
    for (std::int32_t i = 0; i < batch.count; ++i) {
        origins[2 * i] = pick(0, 2 * batch.image_height);
        origins[2 * i + 1] = pick(0, 2 * batch.image_width);
    }
    const auto tiles = exactly<std::uint8_t>(std::int64_t{3} * batch.count * batch.height * batch.width);
    batch.image = image.get();
    batch.origins = origins.get();
    batch.tiles = tiles.get();
    for_each_thread(batch.count, gather_blocks(batch), [&](const ThreadPlace& place) { gather_thread(batch, place); });
}

template <typename Layer, typename Body>
void for_each_piece(const Layer& layer, std::int32_t rows, std::int64_t pieces, const Body& body) {
    for (std::int32_t tile = 0; tile < layer.count; ++tile) {
        for (std::int32_t row = 0; row < rows; ++row) {
            for (std::int64_t piece = 0; piece < pieces; ++piece) {
                body(LayerPlace{static_cast<std::uint32_t>(tile), static_cast<std::uint32_t>(row),
                                static_cast<std::uint32_t>(piece)});
            }
        }
    }
}

// Tensors of halves, in pieces of 16 bytes.
struct Piece {
    alignas(16) char bytes[16];
};

void layers_once() {
    const std::int32_t count = pick(1, 2), height = 2 * pick(1, 5), width = 2 * pick(1, 5), parts = pick(1, 9);
    const std::int64_t pieces = std::int64_t{count} * height * width * parts;
    const auto small = exactly<Piece>(pieces), large = exactly<Piece>(4 * pieces), skip = exactly<Piece>(pieces);
    const auto low = exactly<Piece>(pieces / 4);
    const PoolLayer pool{large.get(), count, height, width, 8 * parts, small.get()};
    for_each_piece(pool, height, pool_pieces(pool), [&](const LayerPlace& place) { pool_thread(pool, place); });
    const SpreadLayer spread{large.get(), count, height, width, 8 * parts, large.get()};
    for_each_piece(spread, 2 * height, spread_pieces(spread), [&](const LayerPlace& p) { spread_thread(spread, p); });
    const JoinLayer join{low.get(), skip.get(), count, height, width, 8 * parts, small.get()};
    for_each_piece(join, height, join_pieces(join), [&](const LayerPlace& place) { join_thread(join, place); });
}

}  // namespace

int main() {
    for (int i = 0; i < 4000; ++i) {
        layers_once();
        stitch_once();
        gather_once();
    }
    std::puts("every address lies in its array");
}
