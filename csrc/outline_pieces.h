// The pieces of a class map while its rows come in: which runs belong together, and the rings around them.
#pragma once

#include <cstdint>
#include <vector>

#include "outline_arcs.h"
#include "outlines.h"

namespace histoseg {

class PieceTable {
public:
    // A new piece of class `id`; its label.
    std::int32_t add(std::uint8_t id);
    // Makes one piece of two; a label of it.
    std::int32_t unite(std::int32_t a, std::int32_t b);
    // The piece has `pixels` more, in row y.
    void grow(std::int32_t label, std::int64_t pixels, std::int32_t y);
    // Adds an arc to the pieces at its sides.
    void add_arc(std::int32_t arc, const Sides& sides);
    // Whether the piece has no pixel in row y. It says so once.
    bool has_ended(std::int32_t label, std::int32_t y);
    // Forgets an ended piece; appends it to `done` unless it is smaller than min_area.
    void take(std::int32_t label, std::int64_t min_area, ArcTable& arcs, std::vector<Piece>& done);

private:
    // An arc as a piece sees it, which always lies to the right of the way along it.
    struct Link {
        std::int32_t arc;
        bool reversed;
    };

    // A label; what belongs to a piece is kept at its root.
    struct Label {
        std::int32_t parent;
        std::int32_t next;  // once around through the labels of the piece
        std::int32_t last_row;
        std::int64_t area;
        std::vector<Link> links;
        std::uint8_t id;
    };

    // A link with the place and the way in which it starts, by which links are sorted.
    struct Step {
        Corner from, to;
        int way, last_way;
        std::int64_t area;
        Link link;
    };

    std::int32_t find(std::int32_t label);
    Label& at(std::int32_t label) { return labels_[static_cast<std::size_t>(label)]; }
    void find_steps(const std::vector<Link>& links, ArcTable& arcs);
    std::size_t step_after(const Step& step) const;
    // Appends the rings of the loop that begins with step `first`.
    void close_loop(std::size_t first, std::int64_t min_area, ArcTable& arcs, std::vector<Ring>& rings);
    // Makes a ring of the end of `path_` from place `start` on.
    void cut_ring(std::size_t start, std::int64_t min_area, ArcTable& arcs, std::vector<Ring>& rings);

    std::vector<Label> labels_;
    std::vector<std::int32_t> free_labels_;
    std::vector<Step> steps_;
    std::vector<bool> used_;                 // by step
    std::vector<std::size_t> node_, place_;  // the first step from the same corner; by that, its place in path_
    std::vector<std::size_t> path_;
};

}  // namespace histoseg
