// Class maps without their noise: removal of small islands, and the majority of a window.
#pragma once

#include <cstdint>

#include "labels.h"

namespace histoseg {

// Pixels and borders are counted in 32 bits: there are at most four entries of borders for each pixel.
constexpr std::int64_t kMaxRegionPixels = std::int64_t{1} << 28;
// A window's count, with 6 bits below it that settle ties, fits 31 bits.
constexpr int kMaxMajorityRadius = 1024;

// Gives components (4-neighbours, equal ids) of fewer than `area` pixels the class that they share the longest border
// with, counted in pixel edges; the lower id on a tie. The smallest component comes first (on a tie, the one whose
// first pixel in raster order is first); it grows together with its neighbours of its new class, and what is still
// too small takes its turn again. So nothing smaller than `area` is left, unless it is the whole image.
// `out`: height x width, C-contiguous. Returns how many pixels changed.
// Memory: 21 bytes a run of equal pixels in a row and 28 a border of a small component: some 150 bytes a pixel on a
// checkerboard, less than one on what networks give.
std::int64_t remove_islands(const IdsView& ids, std::int64_t area, std::uint8_t* out);

// The most frequent class in the window of 2 * radius + 1 pixels a side, which ends at the image's edge; on a tie the
// pixel's own class if it is among the winners, else the lowest. Every id is below `classes` (at most kMaxClasses),
// `radius` is at most kMaxMajorityRadius. `out`: height x width, C-contiguous. The time does not depend on the radius.
void majority(const IdsView& ids, std::int64_t radius, int classes, std::uint8_t* out);

}  // namespace histoseg
