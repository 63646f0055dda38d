// The boundaries of a class map as they grow row by row: strands that become arcs between nodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "outline_simplify.h"

namespace histoseg {

// No strand, no arc, and no piece: what lies there is the background, or outside the image.
constexpr std::int32_t kNone = -1;

// Ways along pixel edges, clockwise on the screen: east, south, west, north.
constexpr int turned_right(int way) { return (way + 1) & 3; }
constexpr int turned_back(int way) { return (way + 2) & 3; }
constexpr int turned_left(int way) { return (way + 3) & 3; }

// What lies to the left and to the right of a boundary: labels of pieces or kNone. `edge`: it is the image's edge.
struct Sides {
    std::int32_t left, right;
    bool edge;
};

// A boundary from node to node, or once around without any (then first and last corner are the same).
struct Arc {
    std::vector<HalfPoint> points;  // closed where it has no node
    Corner first, last;
    int first_way, last_way;  // of its first and its last pixel edge
    std::int64_t area;        // the sum of x dy before simplification, in pixels
    Sides sides;
    int users;  // pieces that still need it
};

// Strands grow from where they start to the right and down only; they end in a node or where two of them meet. Two
// that start together, or that met, belong to one arc, which is finished when it has no loose end.
class ArcTable {
public:
    explicit ArcTable(bool simplify) : simplify_(simplify) {}

    // A new strand from `corner`, a node.
    std::int32_t start(Corner corner, const Sides& sides);
    // A new strand from the corner where `strand` has just been started, which is no node.
    std::int32_t start_twin(std::int32_t strand, const Sides& sides);
    // Returns `strand`, which turns at `corner`.
    std::int32_t turn(std::int32_t strand, Corner corner);
    // `strand` ends in a node.
    void end(std::int32_t strand, Corner corner);
    // Two strands meet at `corner`.
    void join(std::int32_t a, std::int32_t b, Corner corner);

    // Arcs between pieces that were finished since the list was last cleared.
    std::vector<std::int32_t>& finished() { return finished_; }
    Arc& operator[](std::int32_t arc) { return arcs_[static_cast<std::size_t>(arc)]; }
    // One of the arc's users is done with it.
    void release(std::int32_t arc);

private:
    struct Strand {
        std::vector<Corner> corners;
        Sides sides;
        std::int32_t twin = kNone, met = kNone;  // what goes on at its start and at its end; kNone is a node
        std::int32_t other_end = kNone;          // the strand at the other loose end of the arc; kNone is a node
    };

    Strand& strand(std::int32_t i) { return strands_[static_cast<std::size_t>(i)]; }
    // Makes an arc of `first` and all that goes on from its end (backward) or from its start.
    void finish(std::int32_t first, bool backward);
    void add_arc(const std::vector<Corner>& corners, const Sides& sides, bool closed);

    bool simplify_;
    std::vector<Strand> strands_;
    std::vector<Arc> arcs_;
    std::vector<std::int32_t> free_strands_, free_arcs_, finished_;
    std::vector<Corner> corners_;
};

}  // namespace histoseg
