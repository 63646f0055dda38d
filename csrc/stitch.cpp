#include "stitch.h"

#include <algorithm>

#include "simd.h"
#include "stitch_pixel.h"

namespace histoseg {

namespace {

// Pixels a step: logits and the arrays below stay in the L1 cache, and 32-bit sums of confidence cannot overflow.
constexpr int kStep = 512;
static_assert(std::uint64_t{kStep} * kConfidenceUnits <= 0xFFFFFFFFu, "a step's confidence is summed in 32 bits");

// What one step leaves behind for its pixels and classes.
struct Step {
    alignas(64) std::uint32_t winner[kStep];
    alignas(64) float scale[kStep];  // see PixelScore
    alignas(64) float top[kStep];
    std::uint32_t counts[kMaxClasses];
    std::uint32_t confidence[kMaxClasses];
    std::uint32_t nonfinite;
};

// Two to four classes: one pass.
template <int kClasses>
HISTOSEG_INLINE void classify_fixed(const float* const* logits, int count, Step& step) {
    const float* HISTOSEG_RESTRICT row0 = logits[0];
    const float* HISTOSEG_RESTRICT row1 = logits[1];
    const float* HISTOSEG_RESTRICT row2 = logits[kClasses > 2 ? 2 : 0];
    const float* HISTOSEG_RESTRICT row3 = logits[kClasses > 3 ? 3 : 0];
    std::uint32_t* HISTOSEG_RESTRICT winners = step.winner;
    float* HISTOSEG_RESTRICT scales = step.scale;
    float* HISTOSEG_RESTRICT tops = step.top;
    for (int i = 0; i < count; ++i) {
        const PixelScore score = score_pixel<kClasses>(row0[i], row1[i], row2[i], row3[i]);
        winners[i] = score.winner;
        scales[i] = score.scale;
        tops[i] = score.top;
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
        const PixelScore score = settle(step.winner[i], step.top[i], step.scale[i], bad[i]);
        step.winner[i] = score.winner;
        step.scale[i] = score.scale;
    }
}

HISTOSEG_INLINE void probabilities_of_step(const float* const* logits, int classes, int count, const Step& step,
                                           std::uint8_t* out, std::ptrdiff_t stride_class) {
    for (int c = 0; c < classes; ++c, out += stride_class) {
        const float* HISTOSEG_RESTRICT row = logits[c];
        std::uint8_t* HISTOSEG_RESTRICT to = out;
        for (int i = 0; i < count; ++i) to[i] = probability_byte(row[i], step.top[i], step.scale[i]);
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

// A step of pixels of one phase, before they go beside those of the other.
struct Phase {
    alignas(64) std::uint8_t ids[kStep];
    alignas(64) std::uint8_t probabilities[kMaxClasses * kStep];
};

// Bytes x0..x1 of a row whose even ones are `even` and whose odd ones are `odd`, each from its first in that range on.
HISTOSEG_INLINE void interleave(const std::uint8_t* even, const std::uint8_t* odd, std::int64_t x0, std::int64_t x1,
                                std::uint8_t* HISTOSEG_RESTRICT out) {
    const std::uint8_t* HISTOSEG_RESTRICT first = x0 % 2 ? odd : even;
    const std::uint8_t* HISTOSEG_RESTRICT second = x0 % 2 ? even : odd;
    const std::int64_t pairs = (x1 - x0) / 2;
    for (std::int64_t i = 0; i < pairs; ++i) {
        out[2 * i] = first[i];
        out[2 * i + 1] = second[i];
    }
    if ((x1 - x0) % 2) out[2 * pairs] = first[pairs];
}

// Stitches rows of a core, a step at a time.
class Stitcher {
public:
    Stitcher(const LogitsView& logits, const Core& core, const StitchOutput& output)
        : run_(pick_run_step(logits.classes)), logits_(logits), core_(core), output_(output) {}

    std::int64_t nonfinite() const { return nonfinite_; }

    void row(std::int64_t y) {
        const char* data = reinterpret_cast<const char*>(logits_.data) + y * logits_.stride_y;
        std::uint8_t* probabilities = probabilities_at(y);
        for (std::int64_t x = core_.x0; x < core_.x1; x += kStep) {
            const std::int64_t at = x - core_.x0;
            step(data, x, std::min<std::int64_t>(kStep, core_.x1 - x), ids_at(y) + at,
                 probabilities ? probabilities + at : nullptr, output_.probabilities_stride_class);
        }
    }

    void row_of_phases(std::int64_t y) {
        const char* data = reinterpret_cast<const char*>(logits_.data) + y % 2 * logits_.stride_phase_y +
                           y / 2 * logits_.stride_y;
        std::uint8_t* probabilities = probabilities_at(y);
        for (std::int64_t x = core_.x0; x < core_.x1; x += 2 * kStep) {
            const std::int64_t end = std::min<std::int64_t>(x + 2 * kStep, core_.x1), at = x - core_.x0;
            for (int phase = 0; phase < 2; ++phase) {
                const std::int64_t first = (x - phase + 1) / 2, last = (end - phase + 1) / 2;
                step(data + phase * logits_.stride_phase_x, first, last - first, phases_[phase].ids,
                     probabilities ? phases_[phase].probabilities : nullptr, kStep);
            }
            interleave(phases_[0].ids, phases_[1].ids, x, end, ids_at(y) + at);
            if (!probabilities) continue;
            for (std::int64_t c = 0; c < logits_.classes; ++c) {
                interleave(phases_[0].probabilities + c * kStep, phases_[1].probabilities + c * kStep, x, end,
                           probabilities + c * output_.probabilities_stride_class + at);
            }
        }
    }

private:
    std::uint8_t* ids_at(std::int64_t y) const { return output_.classes + (y - core_.y0) * output_.classes_stride_y; }

    std::uint8_t* probabilities_at(std::int64_t y) const {
        if (!output_.probabilities) return nullptr;
        return output_.probabilities + (y - core_.y0) * output_.probabilities_stride_y;
    }

    // `count` pixels from x on in the rows at `data`, those of class 0 and, further on, of the others.
    void step(const char* data, std::int64_t x, std::int64_t count, std::uint8_t* ids, std::uint8_t* probabilities,
              std::ptrdiff_t stride_class) {
        const int classes = static_cast<int>(logits_.classes);
        const float* rows[kMaxClasses];
        for (int c = 0; c < classes; ++c) {
            rows[c] = reinterpret_cast<const float*>(data + c * logits_.stride_class) + x;
        }
        run_(rows, classes, static_cast<int>(count), step_, ids, probabilities, stride_class);
        for (int c = 0; c < classes; ++c) {
            output_.counts[c] += step_.counts[c];
            output_.confidence[c] += step_.confidence[c];
        }
        nonfinite_ += step_.nonfinite;
    }

    const RunStep run_;
    const LogitsView& logits_;
    const Core& core_;
    const StitchOutput& output_;
    std::int64_t nonfinite_ = 0;
    Step step_;
    Phase phases_[2];
};

}  // namespace

std::int64_t stitch(const LogitsView& logits, const Core& core, const StitchOutput& output) {
    Stitcher stitcher(logits, core, output);
    for (std::int64_t y = core.y0; y < core.y1; ++y) {
        logits.phases == 1 ? stitcher.row(y) : stitcher.row_of_phases(y);
    }
    return stitcher.nonfinite();
}

}  // namespace histoseg
