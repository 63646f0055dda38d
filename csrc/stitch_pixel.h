// What a pixel's logits come to: shared by the CPU and CUDA stitchers so that both give the same bytes and sums.
#pragma once

#include <cstdint>

#include "exp.h"
#include "host_device.h"

namespace histoseg {

// One unit of confidence: sums of whole units are exact, so they do not depend on the order of tiles.
constexpr int kConfidenceUnits = 65535;

// `scale` is 1 / sum of exp(logit - top), which is the winner's probability; 0 where a logit is not finite, and only
// there.
struct PixelScore {
    std::uint32_t winner;
    float scale;
    float top;
};

// All ones for NaN and infinities, else zero.
HISTOSEG_INLINE std::uint32_t nonfinite_mask(float x) {
    return (float_bits(x) & 0x7F800000u) == 0x7F800000u ? ~0u : 0u;
}

HISTOSEG_INLINE std::uint32_t confidence_units(float scale) {
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(scale * kConfidenceUnits + 0.5f));
}

HISTOSEG_INLINE std::uint8_t probability_byte(float logit, float top, float scale) {
    return static_cast<std::uint8_t>(static_cast<std::int32_t>(exp_not_positive(logit - top) * scale * 255.0f + 0.5f));
}

// One more class of a pixel: takes over `winner` and `top` if it is higher. Masks, because compilers make
// unpredictable branches of the same thing written with ?: and then do not vectorise.
HISTOSEG_INLINE void challenge(float value, std::uint32_t c, float& top, std::uint32_t& winner, std::uint32_t& bad) {
    const std::uint32_t wins = 0u - static_cast<std::uint32_t>(value > top);
    winner = (winner & ~wins) | (c & wins);
    top = value > top ? value : top;
    bad |= nonfinite_mask(value);
}

// `sum` of exp(logit - top); `bad` is all ones if a logit is not finite, else zero.
HISTOSEG_INLINE PixelScore settle(std::uint32_t winner, float top, float sum, std::uint32_t bad) {
    return {winner & ~bad, bits_float(float_bits(1.0f / sum) & ~bad), top};
}

HISTOSEG_INLINE float lower(float a, float b) { return a < b ? a : b; }
HISTOSEG_INLINE float higher(float a, float b) { return a > b ? a : b; }

// Two to four classes: all of a pixel stays in registers; c and d are not looked at where there are fewer. The
// winner's exp is 1, so with two or three classes only the others' are worked out.
template <int kClasses>
HISTOSEG_INLINE PixelScore score_pixel(float a, float b, float c, float d) {
    static_assert(kClasses >= 2 && kClasses <= 4, "written out for these");
    float top = a;
    std::uint32_t winner = 0, bad = nonfinite_mask(a);
    challenge(b, 1, top, winner, bad);
    if constexpr (kClasses > 2) challenge(c, 2, top, winner, bad);
    if constexpr (kClasses > 3) challenge(d, 3, top, winner, bad);
    float sum = 1.0f;
    if constexpr (kClasses == 2) {
        sum += exp_not_positive(lower(a, b) - top);
    } else if constexpr (kClasses == 3) {
        const float high = higher(a, b), low = lower(a, b);
        sum += exp_not_positive(higher(low, lower(high, c)) - top);
        sum += exp_not_positive(lower(low, c) - top);
    } else {
        sum = exp_not_positive(a - top) + exp_not_positive(b - top);
        sum += exp_not_positive(c - top) + exp_not_positive(d - top);
    }
    return settle(winner, top, sum, bad);
}

}  // namespace histoseg
