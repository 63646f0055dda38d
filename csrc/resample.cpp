#include "resample.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace histoseg {

namespace {

constexpr int kKeptBits = 8;  // of fraction, between the two passes
constexpr int kRowShift = kResampleBits - kKeptBits;
constexpr int kColumnShift = kResampleBits + kKeptBits;

// sum[i] += weight * row[i]; sums stay below 255 * kResampleOne.
HISTOSEG_INLINE void add_row(const std::uint8_t* row, std::uint32_t weight, std::int64_t bytes, std::uint32_t* sum) {
    for (std::int64_t i = 0; i < bytes; ++i) sum[i] += weight * row[i];
}

HISTOSEG_INLINE void keep_row(const std::uint32_t* sum, std::int64_t bytes, std::uint16_t* kept) {
    for (std::int64_t i = 0; i < bytes; ++i) {
        kept[i] = static_cast<std::uint16_t>((sum[i] + (1U << (kRowShift - 1))) >> kRowShift);
    }
}

struct Passes {
    void (*add)(const std::uint8_t* row, std::uint32_t weight, std::int64_t bytes, std::uint32_t* sum);
    void (*keep)(const std::uint32_t* sum, std::int64_t bytes, std::uint16_t* kept);
};

#define HISTOSEG_RESAMPLE_PASSES(name, target)                                                                       \
    target void add_##name(const std::uint8_t* row, std::uint32_t weight, std::int64_t bytes, std::uint32_t* sum) {  \
        add_row(row, weight, bytes, sum);                                                                            \
    }                                                                                                                \
    target void keep_##name(const std::uint32_t* sum, std::int64_t bytes, std::uint16_t* kept) {                     \
        keep_row(sum, bytes, kept);                                                                                  \
    }

HISTOSEG_RESAMPLE_PASSES(baseline, )
#if HISTOSEG_MULTIVERSION
HISTOSEG_RESAMPLE_PASSES(avx2, HISTOSEG_AVX2)
HISTOSEG_RESAMPLE_PASSES(avx512, HISTOSEG_AVX512)
#endif

Passes pick_passes() {
#if HISTOSEG_MULTIVERSION
    if (simd_level() == SimdLevel::avx512) return {add_avx512, keep_avx512};
    if (simd_level() == SimdLevel::avx2) return {add_avx2, keep_avx2};
#endif
    return {add_baseline, keep_baseline};
}

void shrink_columns(const std::uint16_t* kept, const Taps& columns, std::uint8_t* out) {
    for (std::int64_t x = 0; x < columns.count; ++x) {
        const std::uint16_t* weights = columns.weights + x * columns.taps;
        const std::uint16_t* at = kept + 3 * static_cast<std::ptrdiff_t>(columns.first[x]);
        std::uint32_t r = 1U << (kColumnShift - 1), g = r, b = r;
        for (std::int64_t k = 0; k < columns.taps; ++k) {
            const std::uint32_t weight = weights[k];
            if (weight == 0) continue;
            r += weight * at[3 * k];
            g += weight * at[3 * k + 1];
            b += weight * at[3 * k + 2];
        }
        out[3 * x] = static_cast<std::uint8_t>(r >> kColumnShift);
        out[3 * x + 1] = static_cast<std::uint8_t>(g >> kColumnShift);
        out[3 * x + 2] = static_cast<std::uint8_t>(b >> kColumnShift);
    }
}

}  // namespace

bool taps_fit(const Taps& taps, std::int64_t size) {
    for (std::int64_t i = 0; i < taps.count; ++i) {
        if (taps.first[i] < 0) return false;
        std::int64_t sum = 0;
        for (std::int64_t k = 0; k < taps.taps; ++k) {
            const std::int64_t weight = taps.weights[i * taps.taps + k], at = std::int64_t{taps.first[i]} + k;
            if (weight != 0 && (at >= size)) return false;
            sum += weight;
        }
        if (sum != kResampleOne) return false;
    }
    return true;
}

void resample(const ResampleView& view, const Taps& rows, const Taps& columns) {
    const Passes passes = pick_passes();
    const std::int64_t bytes = 3 * view.width;
    std::vector<std::uint32_t> sum(static_cast<std::size_t>(bytes));
    std::vector<std::uint16_t> kept(static_cast<std::size_t>(bytes));
    for (std::int64_t y = 0; y < rows.count; ++y) {
        std::fill(sum.begin(), sum.end(), 0U);
        for (std::int64_t k = 0; k < rows.taps; ++k) {
            const std::uint32_t weight = rows.weights[y * rows.taps + k];
            if (weight == 0) continue;
            passes.add(view.source + (rows.first[y] + k) * view.source_stride_y, weight, bytes, sum.data());
        }
        passes.keep(sum.data(), bytes, kept.data());
        shrink_columns(kept.data(), columns, view.out + y * view.out_stride_y);
    }
}

}  // namespace histoseg
