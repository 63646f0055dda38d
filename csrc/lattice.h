// Fast Gaussian filtering in D dimensions: A. Adams, J. Baek, M. A. Davis, "Fast High-Dimensional Filtering Using the
// Permutohedral Lattice", Eurographics 2010.
//
// The filter sums, for each point i, exp(-|f_i - f_j|^2 / 2) * value_j over all points j, up to a constant factor and
// approximately: values are splatted onto the corners of the simplex of the lattice that holds a point, blurred along
// the lattice's D + 1 axes and read back. Time and memory are linear in the points, whatever the width of the Gaussian.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace histoseg {

// Values a point: one SSE or NEON register.
constexpr int kLanes = 4;

// Points are added in order, then connect() is called once, then splat(), blur() and slice() as often as needed.
// Sums run in an order that does not depend on the number of threads.
template <int D>
class Lattice {
public:
    explicit Lattice(std::int64_t points);

    void add(const float* features, std::int64_t count);  // count x D, in standard deviations of the Gaussian
    void connect();

    void splat(const float* values);  // points x kLanes
    void blur(int threads);
    // Adds to `values` what the filter gives for the points first..last (the end excluded).
    void slice(std::int64_t first, std::int64_t last, float* values) const;
    // From now on a point's values count `factor` times, on their way in and on their way out.
    void scale(std::int64_t point, float factor);

private:
    using Key = std::array<std::int32_t, D>;
    // The remainder-0 point nearest to a feature and the order of the differences to it: they name a simplex.
    struct Simplex {
        std::int32_t nearest[D + 1], rank[D + 1];
    };
    struct Corner {
        std::int32_t vertex;
        float weight;
    };
    struct Pair {
        std::int32_t below, above;
    };
    struct Slot {
        std::uint32_t tag;    // half of the key's hash: most keys that differ are told apart without a look at them
        std::int32_t vertex;  // 0 where free
    };
    // A key on its way into the table, whose slot is fetched from memory meanwhile.
    struct Lookup {
        Key key;
        std::uint64_t hash;
    };

    static Simplex place(const float* feature, float* weights);
    Lookup look_up(const Key& key) const;
    std::size_t slot_of(const Lookup& lookup) const;
    std::int32_t vertex(const Lookup& lookup);
    void grow();
    void add_block(const float* features, int count);

    // Vertex 0 stands for every neighbour that does not exist: its values are 0.
    std::vector<Key> keys_;         // by vertex
    std::vector<Slot> table_;       // open addressing, a power of two
    std::vector<Corner> corners_;          // D + 1 a point
    std::vector<Pair> neighbours_;         // by axis and vertex
    std::vector<float> values_, blurred_;  // kLanes a vertex
};

}  // namespace histoseg
