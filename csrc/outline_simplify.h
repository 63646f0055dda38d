// Outlines of fewer points that still part the same pixels.
#pragma once

#include <cstdint>
#include <vector>

namespace histoseg {

// A corner of pixels: pixel (x, y) lies between (x, y) and (x + 1, y + 1).
struct Corner {
    std::int32_t x, y;
};

// A point in half pixels: corners are even, midpoints of pixel edges have one odd coordinate.
struct HalfPoint {
    std::int32_t x, y;
};

constexpr HalfPoint half_point(Corner c) { return {2 * c.x, 2 * c.y}; }

// Coordinates stay below this, so that products of their differences fit 64 bits, and so do scaled ones in millionths.
constexpr std::int32_t kMaxCorner = std::int32_t{1} << 22;

// The outline through `corners` (two or more, where it starts, turns and ends; horizontal and vertical by turns) with
// fewer points. Where `closed`, the last corner is the first, the outline turns there, and the answer too ends where it
// starts; otherwise both ends stay. Each point of the answer lies within half a pixel of the outline; every other
// pixel centre lies farther off, so none changes sides.
//
// How: each pixel edge of the outline has a gate, the open segment between the centres of the two pixels that it parts.
// A line that passes all gates in turn parts the same centres. Points lie in the middles of gates; of all lines that
// turn only there, the answer has the fewest points (but for a limit on how far one goes straight on). Between its
// gates the line stays in the unit square around each corner, and no other outline enters that (squares where outlines
// meet or touch hold their ends); so simplified outlines cross neither themselves nor one another.
// Time and memory: some hundred nanoseconds and bytes for each turn of the outline.
std::vector<HalfPoint> simplify_outline(const std::vector<Corner>& corners, bool closed);

}  // namespace histoseg
