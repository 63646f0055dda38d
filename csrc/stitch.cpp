#include "stitch.h"

#include <algorithm>

#include "exp.h"
#include "simd.h"

namespace histoseg {

namespace {

// Pixels a step: logits and the arrays below stay in the L1 cache, and 32-bit sums of confidence cannot overflow.
constexpr int kStep = 512;
static_assert(std::uint64_t{kStep} * kConfidenceUnits <= 0xFFFFFFFFu, "a step's confidence is summed in 32 bits");

// What one step leaves behind for its pixels and classes.
struct Step {
    alignas(64) std::uint32_t winner[kStep];
    alignas(64) float scale[kStep];  // 1 / sum of exp(logit - top); 0 where a logit is not finite
    alignas(64) float top[kStep];
    std::uint32_t counts[kMaxClasses];
    std::uint32_t confidence[kMaxClasses];
    std::uint32_t nonfinite;
};

// All ones for NaN and infinities, else zero.
HISTOSEG_INLINE std::uint32_t nonfinite_mask(float x) {
    return (float_bits(x) & 0x7F800000u) == 0x7F800000u ? ~0u : 0u;
}

HISTOSEG_INLINE std::uint32_t confidence_units(float scale) {
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(scale * kConfidenceUnits + 0.5f));
}

// One more class of a pixel: takes over `winner` and `top` if it is higher. Masks, because compilers make
// unpredictable branches of the same thing written with ?: and then do not vectorise.
HISTOSEG_INLINE void challenge(float value, std::uint32_t c, float& top, std::uint32_t& winner, std::uint32_t& bad) {
    const std::uint32_t wins = 0u - static_cast<std::uint32_t>(value > top);
    winner = (winner & ~wins) | (c & wins);
    top = value > top ? value : top;
    bad |= nonfinite_mask(value);
}

HISTOSEG_INLINE float lower(float a, float b) { return a < b ? a : b; }
HISTOSEG_INLINE float higher(float a, float b) { return a > b ? a : b; }

// Two to four classes: all of a pixel stays in registers, one pass. The winner's exp is 1, so with two or three
// classes only the others' are worked out.
template <int kClasses>
HISTOSEG_INLINE void classify_fixed(const float* const* logits, int count, Step& step) {
    static_assert(kClasses >= 2 && kClasses <= 4, "written out for these");
    const float* HISTOSEG_RESTRICT row0 = logits[0];
    const float* HISTOSEG_RESTRICT row1 = logits[1];
    const float* HISTOSEG_RESTRICT row2 = logits[kClasses > 2 ? 2 : 0];
    const float* HISTOSEG_RESTRICT row3 = logits[kClasses > 3 ? 3 : 0];
    std::uint32_t* HISTOSEG_RESTRICT winners = step.winner;
    float* HISTOSEG_RESTRICT scales = step.scale;
    float* HISTOSEG_RESTRICT tops = step.top;
    for (int i = 0; i < count; ++i) {
        const float a = row0[i], b = row1[i], c = row2[i], d = row3[i];
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
        winners[i] = winner & ~bad;
        scales[i] = bits_float(float_bits(1.0f / sum) & ~bad);
        tops[i] = top;
    }
}

// Sums of a step by class. A pixel whose logits are not finite has scale 0, and no other has.
HISTOSEG_INLINE void tally(int classes, int count, Step& step) {
    alignas(64) std::uint32_t units[kStep];
    std::uint32_t nonfinite = 0, all_units = 0;
    for (int i = 0; i < count; ++i) {
        units[i] = confidence_units(step.scale[i]);
        all_units += units[i];
        nonfinite += step.scale[i] == 0.0f ? 1u : 0u;
    }
    step.nonfinite = nonfinite;
    // Class 0 has what the others leave: one pass less.
    step.counts[0] = static_cast<std::uint32_t>(count);
    step.confidence[0] = all_units;
    for (int c = 1; c < classes; ++c) {
        std::uint32_t pixels = 0, sum = 0;
        for (int i = 0; i < count; ++i) {
            const std::uint32_t won = 0u - static_cast<std::uint32_t>(step.winner[i] == static_cast<std::uint32_t>(c));
            pixels += won & 1u;
            sum += won & units[i];
        }
        step.counts[c] = pixels;
        step.confidence[c] = sum;
        step.counts[0] -= pixels;
        step.confidence[0] -= sum;
    }
}

// Any number of classes: a class at a time over the step's pixels.
HISTOSEG_INLINE void classify_any(const float* const* logits, int classes, int count, Step& step) {
    alignas(64) std::uint32_t bad[kStep];
    for (int i = 0; i < count; ++i) {
        step.top[i] = logits[0][i];
        step.winner[i] = 0;
        step.scale[i] = 0.0f;
        bad[i] = nonfinite_mask(logits[0][i]);
    }
    for (int c = 1; c < classes; ++c) {
        const float* HISTOSEG_RESTRICT row = logits[c];
        for (int i = 0; i < count; ++i) {
            challenge(row[i], static_cast<std::uint32_t>(c), step.top[i], step.winner[i], bad[i]);
        }
    }
    for (int c = 0; c < classes; ++c) {
        const float* HISTOSEG_RESTRICT row = logits[c];
        for (int i = 0; i < count; ++i) step.scale[i] += exp_not_positive(row[i] - step.top[i]);
    }
    for (int i = 0; i < count; ++i) {
        step.scale[i] = bits_float(float_bits(1.0f / step.scale[i]) & ~bad[i]);
        step.winner[i] &= ~bad[i];
    }
}

HISTOSEG_INLINE void probabilities_of_step(const float* const* logits, int classes, int count, const Step& step,
                                           std::uint8_t* out, std::ptrdiff_t stride_class) {
    for (int c = 0; c < classes; ++c, out += stride_class) {
        const float* HISTOSEG_RESTRICT row = logits[c];
        std::uint8_t* HISTOSEG_RESTRICT to = out;
        for (int i = 0; i < count; ++i) {
            const float p = exp_not_positive(row[i] - step.top[i]) * step.scale[i];
            to[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(p * 255.0f + 0.5f));
        }
    }
}

// kClasses 0 means that only `classes` knows how many there are.
template <int kClasses>
HISTOSEG_INLINE void run_step(const float* const* logits, int classes, int count, Step& step, std::uint8_t* out,
                              std::uint8_t* probabilities, std::ptrdiff_t stride_class) {
    if constexpr (kClasses > 0) {
        classify_fixed<kClasses>(logits, count, step);
    } else {
        classify_any(logits, classes, count, step);
    }
    tally(kClasses > 0 ? kClasses : classes, count, step);
    for (int i = 0; i < count; ++i) out[i] = static_cast<std::uint8_t>(step.winner[i]);
    if (probabilities) probabilities_of_step(logits, classes, count, step, probabilities, stride_class);
}

using RunStep = void (*)(const float* const* logits, int classes, int count, Step& step, std::uint8_t* out,
                         std::uint8_t* probabilities, std::ptrdiff_t stride_class);

template <int kClasses>
void run_baseline(const float* const* logits, int classes, int count, Step& step, std::uint8_t* out,
                  std::uint8_t* probabilities, std::ptrdiff_t stride_class) {
    run_step<kClasses>(logits, classes, count, step, out, probabilities, stride_class);
}

#if HISTOSEG_MULTIVERSION
template <int kClasses>
HISTOSEG_AVX2 void run_avx2(const float* const* logits, int classes, int count, Step& step, std::uint8_t* out,
                            std::uint8_t* probabilities, std::ptrdiff_t stride_class) {
    run_step<kClasses>(logits, classes, count, step, out, probabilities, stride_class);
}

template <int kClasses>
HISTOSEG_AVX512 void run_avx512(const float* const* logits, int classes, int count, Step& step, std::uint8_t* out,
                                std::uint8_t* probabilities, std::ptrdiff_t stride_class) {
    run_step<kClasses>(logits, classes, count, step, out, probabilities, stride_class);
}
#endif

template <int kClasses>
RunStep pick_level() {
#if HISTOSEG_MULTIVERSION
    if (simd_level() == SimdLevel::avx512) return run_avx512<kClasses>;
    if (simd_level() == SimdLevel::avx2) return run_avx2<kClasses>;
#endif
    return run_baseline<kClasses>;
}

RunStep pick_run_step(std::int64_t classes) {
    switch (classes) {
        case 2: return pick_level<2>();
        case 3: return pick_level<3>();
        case 4: return pick_level<4>();
        default: return pick_level<0>();
    }
}

}  // namespace

std::int64_t stitch(const LogitsView& logits, const Core& core, const StitchOutput& output) {
    const RunStep run = pick_run_step(logits.classes);
    const int classes = static_cast<int>(logits.classes);
    std::int64_t nonfinite = 0;
    Step step;
    for (std::int64_t y = core.y0; y < core.y1; ++y) {
        const char* row = reinterpret_cast<const char*>(logits.data) + y * logits.stride_y;
        std::uint8_t* out = output.classes + (y - core.y0) * output.classes_stride_y;
        std::uint8_t* probabilities = output.probabilities;
        if (probabilities) probabilities += (y - core.y0) * output.probabilities_stride_y;
        for (std::int64_t x = core.x0; x < core.x1; x += kStep) {
            const float* rows[kMaxClasses];
            for (int c = 0; c < classes; ++c) {
                rows[c] = reinterpret_cast<const float*>(row + c * logits.stride_class) + x;
            }
            const int count = static_cast<int>(std::min<std::int64_t>(kStep, core.x1 - x));
            const std::int64_t at = x - core.x0;
            run(rows, classes, count, step, out + at, probabilities ? probabilities + at : nullptr,
                output.probabilities_stride_class);
            for (int c = 0; c < classes; ++c) {
                output.counts[c] += step.counts[c];
                output.confidence[c] += step.confidence[c];
            }
            nonfinite += step.nonfinite;
        }
    }
    return nonfinite;
}

}  // namespace histoseg
