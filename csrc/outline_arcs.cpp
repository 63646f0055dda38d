#include "outline_arcs.h"

#include <utility>

namespace histoseg {
namespace {

template <typename T>
std::int32_t take_place(std::vector<T>& table, std::vector<std::int32_t>& free_places) {
    if (free_places.empty()) {
        table.emplace_back();
        return static_cast<std::int32_t>(table.size() - 1);
    }
    const std::int32_t place = free_places.back();
    free_places.pop_back();
    return place;
}

int way_between(Corner from, Corner to) { return from.y == to.y ? (to.x > from.x ? 0 : 2) : (to.y > from.y ? 1 : 3); }

std::int64_t area_of(const std::vector<Corner>& corners) {
    std::int64_t area = 0;
    for (std::size_t i = 1; i < corners.size(); ++i) {
        area += std::int64_t{corners[i].x} * (corners[i].y - corners[i - 1].y);
    }
    return area;
}

}  // namespace

std::int32_t ArcTable::start(Corner corner, const Sides& sides) {
    const std::int32_t place = take_place(strands_, free_strands_);
    strand(place) = Strand{{corner}, sides};
    return place;
}

std::int32_t ArcTable::start_twin(std::int32_t twin, const Sides& sides) {
    const std::int32_t place = start(strand(twin).corners.front(), sides);
    strand(place).twin = strand(place).other_end = twin;
    strand(twin).twin = strand(twin).other_end = place;
    return place;
}

std::int32_t ArcTable::turn(std::int32_t which, Corner corner) {
    strand(which).corners.push_back(corner);
    return which;
}

void ArcTable::end(std::int32_t which, Corner corner) {
    Strand& ending = strand(which);
    ending.corners.push_back(corner);
    if (ending.other_end == kNone) {
        finish(which, true);
    } else {
        strand(ending.other_end).other_end = kNone;
    }
}

void ArcTable::join(std::int32_t a, std::int32_t b, Corner corner) {
    Strand &one = strand(a), &two = strand(b);
    one.corners.push_back(corner);
    two.corners.push_back(corner);
    one.met = b;
    two.met = a;
    const std::int32_t far_one = one.other_end, far_two = two.other_end;
    if (far_one == b) return finish(a, true);  // once around: it starts and ends here
    if (far_one != kNone) strand(far_one).other_end = far_two;
    if (far_two != kNone) strand(far_two).other_end = far_one;
    if (far_one != kNone || far_two != kNone) return;
    // Both ends are nodes: go back to one of them.
    std::int32_t first = a;
    bool at_start = true;
    for (std::int32_t next = one.twin; next != kNone; at_start = !at_start) {
        first = next;
        next = at_start ? strand(first).met : strand(first).twin;
    }
    finish(first, !at_start);
}

void ArcTable::finish(std::int32_t first, bool backward) {
    Sides sides = strand(first).sides;
    if (backward) std::swap(sides.left, sides.right);
    bool closed = false;
    corners_.clear();
    for (std::int32_t current = first; current != kNone; backward = !backward) {
        Strand& piece = strand(current);
        if (!corners_.empty()) corners_.pop_back();  // where they meet
        if (backward) {
            corners_.insert(corners_.end(), piece.corners.rbegin(), piece.corners.rend());
        } else {
            corners_.insert(corners_.end(), piece.corners.begin(), piece.corners.end());
        }
        const std::int32_t next = backward ? piece.twin : piece.met;
        free_strands_.push_back(current);
        piece.corners = {};
        closed = next == first;
        current = closed ? kNone : next;
    }
    if (sides.left != kNone || sides.right != kNone) add_arc(corners_, sides, closed);
}

void ArcTable::add_arc(const std::vector<Corner>& corners, const Sides& sides, bool closed) {
    const std::size_t count = corners.size();
    Arc arc{};
    arc.first = corners.front();
    arc.last = corners.back();
    arc.first_way = way_between(corners[0], corners[1]);
    arc.last_way = way_between(corners[count - 2], corners[count - 1]);
    arc.area = area_of(corners);
    arc.sides = sides;
    arc.users = (sides.left != kNone) + (sides.right != kNone);
    if (simplify_ && !sides.edge) {
        arc.points = simplify_outline(corners, closed);
    } else {
        for (const Corner corner : corners) arc.points.push_back(half_point(corner));
    }
    const std::int32_t place = take_place(arcs_, free_arcs_);
    (*this)[place] = std::move(arc);
    finished_.push_back(place);
}

void ArcTable::release(std::int32_t which) {
    Arc& arc = (*this)[which];
    if (--arc.users > 0) return;
    arc.points = {};
    free_arcs_.push_back(which);
}

}  // namespace histoseg
