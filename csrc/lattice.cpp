#include "lattice.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "simd.h"
#include "threads.h"

namespace histoseg {

namespace {

constexpr std::size_t kFirstTable = std::size_t{1} << 12;
// Points placed before their corners are looked up.
constexpr int kBlock = 32;
// A blurred vertex costs some 2 ns: fewer than this are not worth a thread.
constexpr std::int64_t kVerticesPerThread = std::int64_t{1} << 15;

// The hyperplane x_0 + ... + x_D = 0 in D + 1 coordinates, scaled so that splat, blur and slice together have
// variance 1 (Adams et al., section 3.1).
template <int D>
void elevate(const float* feature, float* elevated) {
    float sum = 0.0f;
    for (int i = D; i > 0; --i) {
        const float unit = static_cast<float>(std::sqrt(2.0 / 3.0) * (D + 1) / std::sqrt(i * (i + 1.0)));
        const float x = feature[i - 1] * unit;
        elevated[i] = sum - static_cast<float>(i) * x;
        sum += x;
    }
    elevated[0] = sum;
}

HISTOSEG_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

HISTOSEG_INLINE void add_scaled(const float* HISTOSEG_RESTRICT from, float weight, float* HISTOSEG_RESTRICT to) {
    for (int k = 0; k < kLanes; ++k) to[k] += weight * from[k];
}

}  // namespace

template <int D>
Lattice<D>::Lattice(std::int64_t points) : keys_(1), table_(kFirstTable) {
    corners_.reserve(static_cast<std::size_t>(points) * (D + 1));
}

template <int D>
typename Lattice<D>::Lookup Lattice<D>::look_up(const Key& key) const {
    std::uint64_t hash = 0;
    for (const std::int32_t k : key) hash = (hash + static_cast<std::uint32_t>(k)) * 0x9E3779B97F4A7C15u;
    prefetch(&table_[(hash >> 32) & (table_.size() - 1)]);
    return {key, hash};
}

// Where the key is, or else the free slot where it belongs.
template <int D>
std::size_t Lattice<D>::slot_of(const Lookup& lookup) const {
    const std::size_t mask = table_.size() - 1;
    const auto tag = static_cast<std::uint32_t>(lookup.hash);
    std::size_t slot = (lookup.hash >> 32) & mask;
    while (table_[slot].vertex != 0 &&
           (table_[slot].tag != tag || keys_[static_cast<std::size_t>(table_[slot].vertex)] != lookup.key)) {
        slot = (slot + 1) & mask;
    }
    return slot;
}

template <int D>
void Lattice<D>::grow() {
    std::vector<Slot> old(table_.size() * 2);
    old.swap(table_);
    for (std::size_t i = 1; i < keys_.size(); ++i) {
        const Lookup lookup = look_up(keys_[i]);
        table_[slot_of(lookup)] = {static_cast<std::uint32_t>(lookup.hash), static_cast<std::int32_t>(i)};
    }
}

template <int D>
std::int32_t Lattice<D>::vertex(const Lookup& lookup) {
    const std::size_t slot = slot_of(lookup);
    if (table_[slot].vertex != 0) return table_[slot].vertex;
    const auto fresh = static_cast<std::int32_t>(keys_.size());
    table_[slot] = {static_cast<std::uint32_t>(lookup.hash), fresh};
    keys_.push_back(lookup.key);
    if (keys_.size() * 2 > table_.size()) grow();
    return fresh;
}

// The simplex that holds a feature, and the weights of its corners (Adams et al., section 3.2).
template <int D>
typename Lattice<D>::Simplex Lattice<D>::place(const float* feature, float* weights) {
    float elevated[D + 1];
    elevate<D>(feature, elevated);
    Simplex simplex{};
    int sum = 0;
    for (int i = 0; i <= D; ++i) {
        const float v = elevated[i] * (1.0f / (D + 1));
        const int rounded = static_cast<int>(v + (v < 0.0f ? -0.5f : 0.5f));
        simplex.nearest[i] = rounded * (D + 1);
        elevated[i] -= static_cast<float>(simplex.nearest[i]);
        sum += rounded;
    }
    for (int i = 0; i < D; ++i) {
        for (int j = i + 1; j <= D; ++j) {
            const int lower = elevated[i] < elevated[j];
            simplex.rank[i] += lower;
            simplex.rank[j] += 1 - lower;
        }
    }
    float edges[D + 2] = {};
    for (int i = 0; i <= D; ++i) {
        // Rounding may leave the hyperplane; the coordinates that were rounded most go back.
        const int rank = simplex.rank[i] + sum;
        const int turn = rank < 0 ? D + 1 : rank > D ? -(D + 1) : 0;
        simplex.rank[i] = rank + turn;
        simplex.nearest[i] += turn;
        const float v = (elevated[i] - static_cast<float>(turn)) * (1.0f / (D + 1));
        edges[D - simplex.rank[i]] += v;
        edges[D + 1 - simplex.rank[i]] -= v;
    }
    edges[0] += 1.0f + edges[D + 1];
    std::copy(edges, edges + D + 1, weights);
    return simplex;
}

// Two passes: while the slots of some points' corners are on their way from memory, the next points are placed.
template <int D>
void Lattice<D>::add_block(const float* features, int count) {
    Simplex simplices[kBlock];
    Lookup lookups[kBlock * (D + 1)];
    bool repeats[kBlock];
    const std::size_t first = corners_.size();
    for (int p = 0; p < count; ++p) {
        float weights[D + 1];
        simplices[p] = place(features + p * D, weights);
        // Neighbouring pixels often share a simplex.
        repeats[p] = p > 0 && std::memcmp(&simplices[p], &simplices[p - 1], sizeof(Simplex)) == 0;
        for (int r = 0; r <= D; ++r) {
            corners_.push_back({0, weights[r]});
            if (repeats[p]) continue;
            // The corner of remainder r: moved by r, or by r - (D + 1) along the coordinates of high rank.
            Key key;
            for (int i = 0; i < D; ++i) {
                key[i] = simplices[p].nearest[i] + r - (simplices[p].rank[i] > D - r ? D + 1 : 0);
            }
            lookups[p * (D + 1) + r] = look_up(key);
        }
    }
    for (int p = 0; p < count; ++p) {
        Corner* corners = corners_.data() + first + static_cast<std::size_t>(p * (D + 1));
        for (int r = 0; r <= D; ++r) {
            corners[r].vertex = repeats[p] ? corners[r - (D + 1)].vertex : vertex(lookups[p * (D + 1) + r]);
        }
    }
}

template <int D>
void Lattice<D>::add(const float* features, std::int64_t count) {
    for (std::int64_t p = 0; p < count; p += kBlock) {
        add_block(features + p * D, static_cast<int>(std::min<std::int64_t>(kBlock, count - p)));
    }
}

template <int D>
void Lattice<D>::connect() {
    const std::size_t count = keys_.size();
    neighbours_.assign(count * (D + 1), Pair{0, 0});
    Lookup lookups[kBlock];
    for (int axis = 0; axis <= D; ++axis) {
        Pair* pairs = neighbours_.data() + static_cast<std::size_t>(axis) * count;
        for (std::size_t first = 1; first < count; first += kBlock) {
            const std::size_t last = std::min(first + kBlock, count);
            for (std::size_t i = first; i < last; ++i) {
                Key key = keys_[i];
                for (int k = 0; k < D; ++k) key[k] += k == axis ? -D : 1;
                lookups[i - first] = look_up(key);
            }
            for (std::size_t i = first; i < last; ++i) {
                const std::int32_t above = table_[slot_of(lookups[i - first])].vertex;
                if (above == 0) continue;
                pairs[i].above = above;
                pairs[above].below = static_cast<std::int32_t>(i);
            }
        }
    }
    std::vector<Key>().swap(keys_);
    std::vector<Slot>().swap(table_);
    values_.resize(count * kLanes);
    blurred_.resize(count * kLanes);
}

// One thread: pixels share vertices, and the order of a sum must not depend on how many there are.
template <int D>
void Lattice<D>::splat(const float* values) {
    std::fill(values_.begin(), values_.end(), 0.0f);
    const Corner* corner = corners_.data();
    for (const Corner* end = corner + corners_.size(); corner != end; values += kLanes) {
        for (int r = 0; r <= D; ++r, ++corner) {
            add_scaled(values, corner->weight, values_.data() + std::ptrdiff_t{corner->vertex} * kLanes);
        }
    }
}

template <int D>
void Lattice<D>::blur(int threads) {
    const auto count = static_cast<std::int64_t>(values_.size() / kLanes);
    const auto useful = static_cast<int>(std::min<std::int64_t>(threads, count / kVerticesPerThread));
    for (int axis = 0; axis <= D; ++axis) {
        const Pair* pairs = neighbours_.data() + axis * count;
        for_row_chunks(count, std::max(useful, 1), [&](int, std::int64_t first, std::int64_t last) {
            const float* from = values_.data();
            for (std::int64_t i = first; i < last; ++i) {
                float sum[kLanes];
                for (int k = 0; k < kLanes; ++k) sum[k] = from[i * kLanes + k];
                add_scaled(from + std::ptrdiff_t{pairs[i].below} * kLanes, 0.5f, sum);
                add_scaled(from + std::ptrdiff_t{pairs[i].above} * kLanes, 0.5f, sum);
                for (int k = 0; k < kLanes; ++k) blurred_[static_cast<std::size_t>(i * kLanes + k)] = sum[k];
            }
        });
        values_.swap(blurred_);
    }
}

template <int D>
void Lattice<D>::slice(std::int64_t first, std::int64_t last, float* values) const {
    const Corner* corner = corners_.data() + first * (D + 1);
    for (std::int64_t i = first; i < last; ++i) {
        float sum[kLanes] = {};
        for (int r = 0; r <= D; ++r, ++corner) {
            add_scaled(values_.data() + std::ptrdiff_t{corner->vertex} * kLanes, corner->weight, sum);
        }
        for (int k = 0; k < kLanes; ++k) values[i * kLanes + k] += sum[k];
    }
}

template <int D>
void Lattice<D>::scale(std::int64_t point, float factor) {
    for (int r = 0; r <= D; ++r) corners_[static_cast<std::size_t>(point * (D + 1) + r)].weight *= factor;
}

template class Lattice<2>;
template class Lattice<5>;

}  // namespace histoseg
