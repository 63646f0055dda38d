// The matching of one label pixel, shared by the CPU and CUDA decoders so that both give the same ids.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace histoseg {

constexpr int kMaxClasses = 32;
constexpr std::uint8_t kUnmatched = 255;
// The squared distance between black and white: no tolerance needs to be larger.
constexpr std::int32_t kMaxDistance2 = 3 * 255 * 255;

// A palette as plain data: it is copied into CUDA kernels as an argument.
struct PaletteTable {
    std::int32_t size = 0;
    std::uint8_t colours[kMaxClasses][3] = {};
};

struct Match {
    std::int32_t id;
    std::int32_t distance2;
};

// Nearest palette colour by squared Euclidean distance in RGB; ties go to the lower id.
HISTOSEG_HD inline Match nearest_colour(const PaletteTable& palette, int r, int g, int b) {
    Match best{0, kMaxDistance2 + 1};
    for (std::int32_t id = 0; id < palette.size; ++id) {
        const int dr = r - palette.colours[id][0];
        const int dg = g - palette.colours[id][1];
        const int db = b - palette.colours[id][2];
        const std::int32_t distance2 = dr * dr + dg * dg + db * db;
        if (distance2 < best.distance2) best = Match{id, distance2};
    }
    return best;
}

}  // namespace histoseg
