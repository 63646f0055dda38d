#include "outline_simplify.h"

#include <cstddef>
#include <cstdlib>

namespace histoseg {
namespace {

// Gates that are tried beyond the farthest visible one: a bound on the time of made-up outlines.
constexpr std::size_t kLookAhead = 256;

// The gate of a pixel edge: the centres of the pixels to the left and to the right of the way along it (y down).
struct Gate {
    HalfPoint left, right;
    HalfPoint middle() const { return {(left.x + right.x) / 2, (left.y + right.y) / 2}; }
};

// The gates of the first and the last edge of each straight run: whoever passes both passes those between.
std::vector<Gate> find_gates(const std::vector<Corner>& corners) {
    std::vector<Gate> gates;
    for (std::size_t i = 0; i + 1 < corners.size(); ++i) {
        const HalfPoint from = half_point(corners[i]), to = half_point(corners[i + 1]);
        const int dx = (to.x > from.x) - (to.x < from.x), dy = (to.y > from.y) - (to.y < from.y);
        const auto add = [&](HalfPoint middle) {
            gates.push_back({{middle.x + dy, middle.y - dx}, {middle.x - dy, middle.y + dx}});
        };
        add({from.x + dx, from.y + dy});
        if (std::abs(to.x - from.x) + std::abs(to.y - from.y) > 2) add({to.x - dx, to.y - dy});
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

}  // namespace

std::vector<HalfPoint> simplify_outline(const std::vector<Corner>& corners, bool closed) {
    const std::vector<Gate> gates = find_gates(corners);
    // A closed outline starts and ends in its first gate, which it passes there.
    const HalfPoint last = closed ? gates.front().middle() : half_point(corners.back());
    HalfPoint eye = closed ? last : half_point(corners.front());
    std::vector<HalfPoint> points{eye};
    for (std::size_t next = closed ? 1 : 0; next <= gates.size();) {
        View view(eye);
        std::size_t farthest = next;
        for (std::size_t i = next; i <= gates.size() && i <= farthest + kLookAhead; ++i) {
            const HalfPoint candidate = i == gates.size() ? last : gates[i].middle();
            if (view.sees(candidate)) {
                farthest = i;
                eye = candidate;
            }
            if (i < gates.size() && !view.narrow(gates[i])) break;
        }
        points.push_back(eye);
        next = farthest + 1;
    }
    return points;
}

}  // namespace histoseg
