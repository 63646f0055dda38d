#include "outline_pieces.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

namespace histoseg {
namespace {

constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();

bool same(Corner a, Corner b) { return a.x == b.x && a.y == b.y; }

}  // namespace

std::int32_t PieceTable::add(std::uint8_t id) {
    std::int32_t label;
    if (free_labels_.empty()) {
        label = static_cast<std::int32_t>(labels_.size());
        labels_.emplace_back();
    } else {
        label = free_labels_.back();
        free_labels_.pop_back();
    }
    at(label) = Label{label, label, 0, 0, {}, id};
    return label;
}

std::int32_t PieceTable::find(std::int32_t label) {
    while (at(label).parent != label) label = at(label).parent = at(at(label).parent).parent;
    return label;
}

std::int32_t PieceTable::unite(std::int32_t a, std::int32_t b) {
    a = find(a);
    b = find(b);
    if (a == b) return a;
    // The shorter list moves, so that no link moves often.
    if (at(a).links.size() < at(b).links.size()) std::swap(a, b);
    Label &kept = at(a), &other = at(b);
    other.parent = a;
    std::swap(kept.next, other.next);
    kept.area += other.area;
    kept.last_row = std::max(kept.last_row, other.last_row);
    kept.links.insert(kept.links.end(), other.links.begin(), other.links.end());
    other.links = {};
    return a;
}

void PieceTable::grow(std::int32_t label, std::int64_t pixels, std::int32_t y) {
    Label& piece = at(find(label));
    piece.area += pixels;
    piece.last_row = y;
}

void PieceTable::add_arc(std::int32_t arc, const Sides& sides) {
    if (sides.right != kNone) at(find(sides.right)).links.push_back({arc, false});
    if (sides.left != kNone) at(find(sides.left)).links.push_back({arc, true});
}

bool PieceTable::has_ended(std::int32_t label, std::int32_t y) {
    Label& piece = at(find(label));
    return std::exchange(piece.last_row, y) != y;
}

void PieceTable::take(std::int32_t label, std::int64_t min_area, ArcTable& arcs, std::vector<Piece>& done) {
    const std::int32_t root = find(label);
    const std::vector<Link> links = std::move(at(root).links);
    if (at(root).area >= min_area) {
        find_steps(links, arcs);
        Piece piece{at(root).id, {}};
        for (std::size_t first = 0; first < steps_.size(); ++first) {
            if (!used_[first]) close_loop(first, min_area, arcs, piece.rings);
        }
        done.push_back(std::move(piece));
    }
    for (const Link& link : links) arcs.release(link.arc);
    std::int32_t member = root;
    do {
        free_labels_.push_back(member);
        member = at(member).next;
    } while (member != root);
}

void PieceTable::find_steps(const std::vector<Link>& links, ArcTable& arcs) {
    steps_.clear();
    for (const Link& link : links) {
        const Arc& arc = arcs[link.arc];
        steps_.push_back(link.reversed ? Step{arc.last, arc.first, turned_back(arc.last_way),
                                              turned_back(arc.first_way), -arc.area, link}
                                       : Step{arc.first, arc.last, arc.first_way, arc.last_way, arc.area, link});
    }
    std::sort(steps_.begin(), steps_.end(), [](const Step& a, const Step& b) {
        return std::tie(a.from.y, a.from.x, a.way) < std::tie(b.from.y, b.from.x, b.way);
    });
    used_.assign(steps_.size(), false);
    place_.assign(steps_.size(), kNowhere);
    node_.resize(steps_.size());
    for (std::size_t i = 0; i < steps_.size(); ++i) {
        node_[i] = i > 0 && same(steps_[i].from, steps_[i - 1].from) ? node_[i - 1] : i;
    }
}

// Where two pixels of the piece touch at a corner, the way keeps to the one that it has followed: right, if it can.
std::size_t PieceTable::step_after(const Step& step) const {
    const auto first = std::lower_bound(steps_.begin(), steps_.end(), step.to, [](const Step& a, Corner to) {
        return std::tie(a.from.y, a.from.x) < std::tie(to.y, to.x);
    });
    for (const int way : {turned_right(step.last_way), step.last_way, turned_left(step.last_way)}) {
        for (auto next = first; next != steps_.end() && same(next->from, step.to); ++next) {
            if (next->way == way) return static_cast<std::size_t>(next - steps_.begin());
        }
    }
    return kNowhere;  // never: boundaries go on
}

void PieceTable::close_loop(std::size_t first, std::int64_t min_area, ArcTable& arcs, std::vector<Ring>& rings) {
    path_.clear();
    for (std::size_t i = first; !used_[i]; i = step_after(steps_[i])) {
        // Back at a corner: what lies between is a ring that touches the rest there.
        if (place_[node_[i]] != kNowhere) cut_ring(place_[node_[i]], min_area, arcs, rings);
        used_[i] = true;
        place_[node_[i]] = path_.size();
        path_.push_back(i);
    }
    cut_ring(0, min_area, arcs, rings);
}

void PieceTable::cut_ring(std::size_t start, std::int64_t min_area, ArcTable& arcs, std::vector<Ring>& rings) {
    std::int64_t area = 0;
    Ring ring;
    for (std::size_t k = start; k < path_.size(); ++k) {
        const Step& step = steps_[path_[k]];
        const std::vector<HalfPoint>& points = arcs[step.link.arc].points;
        if (step.link.reversed) {
            ring.insert(ring.end(), points.rbegin(), points.rend() - 1);
        } else {
            ring.insert(ring.end(), points.begin(), points.end() - 1);
        }
        area += step.area;
        place_[node_[path_[k]]] = kNowhere;
    }
    path_.resize(start);
    if (area < 0 && -area < min_area) return;
    ring.push_back(ring.front());
    rings.push_back(std::move(ring));
    if (area > 0) std::swap(rings.front(), rings.back());
}

}  // namespace histoseg
