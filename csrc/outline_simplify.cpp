#include "outline_simplify.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <limits>

namespace histoseg {
namespace {

// A line passes at most so many gates, which bounds the time of made-up outlines; some 40 pixels of a straight one.
constexpr std::size_t kMaxPassed = 64;
// What a point costs, and what it costs more where it does not lie in the middle of a run.
constexpr std::int64_t kPoint = std::int64_t{1} << 32, kOffMiddle = 1;

// The gate of a pixel edge: the centres of the pixels to the left and to the right of the way along it (y down).
struct Gate {
    HalfPoint left, middle, right;
    std::int64_t cost;  // of a point in its middle
};

// The gates of the first and the last edge of each straight run, and one across its middle: whoever passes these
// passes those between.
std::vector<Gate> find_gates(const std::vector<Corner>& corners) {
    std::vector<Gate> gates;
    for (std::size_t i = 0; i + 1 < corners.size(); ++i) {
        const HalfPoint from = half_point(corners[i]), to = half_point(corners[i + 1]);
        const int dx = (to.x > from.x) - (to.x < from.x), dy = (to.y > from.y) - (to.y < from.y);
        const auto add = [&](HalfPoint middle, std::int64_t cost) {
            gates.push_back({{middle.x + dy, middle.y - dx}, middle, {middle.x - dy, middle.y + dx}, cost});
        };
        const bool single = std::abs(to.x - from.x) + std::abs(to.y - from.y) == 2;
        if (!single) add({from.x + dx, from.y + dy}, kPoint + kOffMiddle);
        add({(from.x + to.x) / 2, (from.y + to.y) / 2}, kPoint);
        if (!single) add({to.x - dx, to.y - dy}, kPoint + kOffMiddle);
    }
    return gates;
}

// What can be seen from a point through gates: the open cone between two directions, less than half a turn wide.
class View {
public:
    explicit View(HalfPoint eye) : eye_(eye) {}

    // Whether anything is left. The gate is the next on the way, so its ends lie less than half a turn from the cone.
    bool narrow(const Gate& gate) {
        const Direction left = to(gate.left), right = to(gate.right);
        if (unlimited_ || cross(left_, left) > 0) left_ = left;
        if (unlimited_ || cross(right, right_) > 0) right_ = right;
        unlimited_ = false;
        return cross(left_, right_) > 0;
    }

    bool sees(HalfPoint point) const {
        return unlimited_ || (cross(left_, to(point)) > 0 && cross(to(point), right_) > 0);
    }

private:
    struct Direction {
        std::int64_t x, y;
    };

    Direction to(HalfPoint point) const {
        return {std::int64_t{point.x} - eye_.x, std::int64_t{point.y} - eye_.y};
    }

    // Above 0 where b points to the right of a (y down).
    static std::int64_t cross(Direction a, Direction b) { return a.x * b.y - a.y * b.x; }

    HalfPoint eye_;
    Direction left_{}, right_{};
    bool unlimited_ = true;
};

// By gate, and at the end for the last point: the cheapest way there, and the stop before it. Stop 0 is the start,
// stop i + 1 the middle of gate i.
struct Stop {
    std::int64_t cost;
    std::size_t before;
};

}  // namespace

std::vector<HalfPoint> simplify_outline(const std::vector<Corner>& corners, bool closed) {
    std::vector<Gate> gates = find_gates(corners);
    // A closed outline starts and ends in its first gate, which it passes there.
    const HalfPoint last = closed ? gates.front().middle : half_point(corners.back());
    const HalfPoint first = closed ? last : half_point(corners.front());
    if (closed) gates.erase(gates.begin());
    const std::size_t end = gates.size();
    const auto point_at = [&](std::size_t stop) {
        return stop == 0 ? first : stop > end ? last : gates[stop - 1].middle;
    };

    std::vector<Stop> stops(end + 2, {std::numeric_limits<std::int64_t>::max(), 0});
    stops[0].cost = 0;
    for (std::size_t from = 0; from <= end; ++from) {
        View view(point_at(from));
        for (std::size_t to = from + 1; to <= std::min(end + 1, from + kMaxPassed); ++to) {
            const std::int64_t cost = stops[from].cost + (to > end ? 0 : gates[to - 1].cost);
            if (cost < stops[to].cost && view.sees(point_at(to))) stops[to] = {cost, from};
            if (to > end || !view.narrow(gates[to - 1])) break;
        }
    }

    std::vector<HalfPoint> points{last};
    for (std::size_t stop = end + 1; stop > 0;) {
        stop = stops[stop].before;
        points.push_back(point_at(stop));
    }
    std::reverse(points.begin(), points.end());
    return points;
}

}  // namespace histoseg
