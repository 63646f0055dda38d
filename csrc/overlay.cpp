#include "overlay.h"

#include <algorithm>
#include <cstring>

#include "label_spans.h"
#include "simd.h"

namespace histoseg {

namespace {

// Pixels a step: all buffers below stay in the L1 cache.
constexpr int kStep = 1024;

struct Step {
    std::uint8_t before[kStep];  // the id of each pixel's left neighbour
    std::uint8_t paint[kStep];   // the class whose colour is laid over it
    std::uint8_t weight[kStep];  // how strongly; 255 is the pure colour
    std::uint8_t weights[3 * kStep];
    std::uint8_t colours[3 * kStep];
};

// `left` is ids[-1], or ids[0] at the image's edge.
HISTOSEG_INLINE void choose_paint(const std::uint8_t* ids, const std::uint8_t* above, std::uint8_t left, int count,
                                  std::uint8_t alpha, Step& step) {
    step.before[0] = left;
    std::memcpy(step.before + 1, ids, static_cast<std::size_t>(count - 1));
    for (int i = 0; i < count; ++i) {
        const std::uint8_t own = ids[i], before = step.before[i], over = above[i];
        const std::uint8_t neighbour = before != 0 ? before : over;
        const bool edge = (own != before) | (own != over);
        const std::uint8_t inside = own != 0 ? alpha : std::uint8_t{0};
        step.paint[i] = own != 0 ? own : neighbour;
        step.weight[i] = edge ? std::uint8_t{255} : inside;
    }
}

// round(a / 255) for a up to 255 * 255, in 16 bits.
HISTOSEG_INLINE std::uint8_t divide_255(std::uint16_t a) {
    a = static_cast<std::uint16_t>(a + 128);
    return static_cast<std::uint8_t>(static_cast<std::uint16_t>(a + (a >> 8)) >> 8);
}

HISTOSEG_INLINE void tint_step(const std::uint8_t* rgb, const std::uint8_t* ids, const std::uint8_t* above,
                               std::uint8_t left, int count, const PaletteTable& palette, std::uint8_t alpha,
                               EncodeSpan encode_span, Step& step, std::uint8_t* out) {
    choose_paint(ids, above, left, count, alpha, step);
    encode_span(step.paint, static_cast<std::size_t>(count), palette, step.colours);
    for (int i = 0; i < count; ++i) {
        for (int c = 0; c < 3; ++c) step.weights[3 * i + c] = step.weight[i];
    }
    // Not straight into `out`, which may be `rgb`: the compiler would have to assume the worst.
    for (int i = 0; i < 3 * count; ++i) {
        const std::uint16_t w = step.weights[i], rest = static_cast<std::uint16_t>(255 - w);
        step.colours[i] = divide_255(static_cast<std::uint16_t>(rgb[i] * rest + step.colours[i] * w));
    }
    std::memcpy(out, step.colours, 3 * static_cast<std::size_t>(count));
}

using TintStep = void (*)(const std::uint8_t* rgb, const std::uint8_t* ids, const std::uint8_t* above,
                          std::uint8_t left, int count, const PaletteTable& palette, std::uint8_t alpha,
                          EncodeSpan encode_span, Step& step, std::uint8_t* out);

#define HISTOSEG_TINT_STEP(name)                                                                                    \
    void name(const std::uint8_t* rgb, const std::uint8_t* ids, const std::uint8_t* above, std::uint8_t left,       \
              int count, const PaletteTable& palette, std::uint8_t alpha, EncodeSpan encode_span, Step& step,       \
              std::uint8_t* out) {                                                                                  \
        tint_step(rgb, ids, above, left, count, palette, alpha, encode_span, step, out);                            \
    }

HISTOSEG_TINT_STEP(tint_baseline)
#if HISTOSEG_MULTIVERSION
HISTOSEG_AVX2 HISTOSEG_TINT_STEP(tint_avx2)
HISTOSEG_AVX512 HISTOSEG_TINT_STEP(tint_avx512)
#endif

TintStep pick_tint_step() {
#if HISTOSEG_MULTIVERSION
    if (simd_level() == SimdLevel::avx512) return tint_avx512;
    if (simd_level() == SimdLevel::avx2) return tint_avx2;
#endif
    return tint_baseline;
}

}  // namespace

void tint(const TintBand& band, const PaletteTable& palette, std::uint8_t alpha) {
    const TintStep tint_step = pick_tint_step();
    const EncodeSpan encode_span = pick_encode_span();
    Step step;
    const std::uint8_t* above = band.above != nullptr ? band.above : band.ids;
    for (std::int64_t y = 0; y < band.height; ++y) {
        const std::uint8_t* ids = band.ids + y * band.ids_stride_y;
        const std::uint8_t* rgb = band.rgb + y * band.rgb_stride_y;
        std::uint8_t* out = band.out + y * band.out_stride_y;
        for (std::int64_t x = 0; x < band.width; x += kStep) {
            const int count = static_cast<int>(std::min<std::int64_t>(kStep, band.width - x));
            tint_step(rgb + 3 * x, ids + x, above + x, ids[std::max<std::int64_t>(x - 1, 0)], count, palette, alpha,
                      encode_span, step, out + 3 * x);
        }
        above = ids;
    }
}

}  // namespace histoseg
