#include "label_spans.h"

#include <cstring>

#include "simd.h"

#if HISTOSEG_MULTIVERSION
#include <immintrin.h>
#endif

namespace histoseg {

namespace {

std::uint32_t code(const std::uint8_t* rgb) { return rgb[0] | rgb[1] << 8 | rgb[2] << 16; }

std::uint8_t exact_id(const PaletteTable& palette, std::uint32_t wanted) {
    for (int id = 0; id < palette.size; ++id) {
        if (code(palette.colours[id]) == wanted) return static_cast<std::uint8_t>(id);
    }
    return kUnmatched;
}

bool decode_baseline(const std::uint8_t* rgb, std::size_t count, const PaletteTable& palette, std::uint8_t* ids) {
    // Labels are flat areas: most pixels repeat the one before.
    std::uint32_t last = 0;
    std::uint8_t id = exact_id(palette, last);
    bool matched = true;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t now = code(rgb + 3 * i);
        if (now != last) {
            last = now;
            id = exact_id(palette, now);
        }
        ids[i] = id;
        matched &= id != kUnmatched;
    }
    return matched;
}

void encode_baseline(const std::uint8_t* ids, std::size_t count, const PaletteTable& palette, std::uint8_t* rgb) {
    for (std::size_t i = 0; i < count; ++i) std::memcpy(rgb + 3 * i, palette.colours[ids[i]], 3);
}

#if HISTOSEG_MULTIVERSION

// The block after the one at `at`. The last one overlaps its neighbour instead of running past the end.
inline std::size_t next_block(std::size_t at, std::size_t step, std::size_t count) {
    const std::size_t next = at + step;
    return next < count && next + step > count ? count - step : next;
}

// Eight packed pixels (24 bytes, no more are read) as eight 32-bit lanes 0x00BBGGRR.
HISTOSEG_AVX2 inline __m256i load_codes(const std::uint8_t* rgb) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb + 8));
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), spread);
}

HISTOSEG_AVX2 bool decode_avx2(const std::uint8_t* rgb, std::size_t count, const PaletteTable& palette,
                               std::uint8_t* ids) {
    constexpr std::size_t kStep = 32;
    if (count < kStep) return decode_baseline(rgb, count, palette, ids);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i unmatched = _mm256_setzero_si256();
    for (std::size_t i = 0; i < count; i = next_block(i, kStep, count)) {
        __m256i codes[4], found[4];
        for (int k = 0; k < 4; ++k) {
            codes[k] = load_codes(rgb + 3 * i + 24 * k);
            found[k] = _mm256_set1_epi32(-1);
        }
        // From the last colour to the first, so that the lowest id wins if a colour is listed twice.
        for (int id = palette.size - 1; id >= 0; --id) {
            const __m256i wanted = _mm256_set1_epi32(static_cast<int>(code(palette.colours[id])));
            const __m256i value = _mm256_set1_epi32(id);
            for (int k = 0; k < 4; ++k) {
                found[k] = _mm256_blendv_epi8(found[k], value, _mm256_cmpeq_epi32(codes[k], wanted));
            }
        }
        // Saturating packs keep -1 as it is, and -1 is kUnmatched in a byte.
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(found[0], found[1]),  //
                                                  _mm256_packs_epi32(found[2], found[3]));
        unmatched = _mm256_or_si256(unmatched, packed);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    return _mm256_movemask_epi8(unmatched) == 0;
}

// For each byte of `size` packed pixels, in three parts: the pixel it belongs to, and where its channel's plane
// begins in a colour table of planes of kMaxClasses bytes; all ones where it is of channel c in is_channel[c].
template <int size>
struct Interleave {
    alignas(64) std::uint8_t from[3][size];
    alignas(64) std::uint8_t channel[3][size];
    alignas(64) std::uint8_t is_channel[3][3][size];
};

template <int size>
constexpr Interleave<size> make_interleave() {
    Interleave<size> table{};
    for (int at = 0; at < 3 * size; ++at) {
        table.from[at / size][at % size] = static_cast<std::uint8_t>(at / 3);
        table.channel[at / size][at % size] = static_cast<std::uint8_t>(kMaxClasses * (at % 3));
        for (int c = 0; c < 3; ++c) table.is_channel[c][at / size][at % size] = at % 3 == c ? 255 : 0;
    }
    return table;
}

constexpr Interleave<16> kInterleave16 = make_interleave<16>();
constexpr Interleave<64> kInterleave64 = make_interleave<64>();

HISTOSEG_AVX2 void encode_avx2(const std::uint8_t* ids, std::size_t count, const PaletteTable& palette,
                               std::uint8_t* rgb) {
    constexpr std::size_t kStep = 16;
    // One byte shuffle looks up sixteen colours; larger palettes are rare.
    if (count < kStep || palette.size > 16) return encode_baseline(ids, count, palette, rgb);
    alignas(16) std::uint8_t planes[3][16] = {};
    for (int id = 0; id < palette.size; ++id) {
        for (int c = 0; c < 3; ++c) planes[c][id] = palette.colours[id][c];
    }
    __m128i spread[3], green[3], blue[3], plane[3];
    for (int part = 0; part < 3; ++part) {
        spread[part] = _mm_load_si128(reinterpret_cast<const __m128i*>(kInterleave16.from[part]));
        green[part] = _mm_load_si128(reinterpret_cast<const __m128i*>(kInterleave16.is_channel[1][part]));
        blue[part] = _mm_load_si128(reinterpret_cast<const __m128i*>(kInterleave16.is_channel[2][part]));
        plane[part] = _mm_load_si128(reinterpret_cast<const __m128i*>(planes[part]));
    }
    for (std::size_t i = 0; i < count; i = next_block(i, kStep, count)) {
        const __m128i block = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids + i));
        for (int part = 0; part < 3; ++part) {
            const __m128i each = _mm_shuffle_epi8(block, spread[part]);
            __m128i value = _mm_shuffle_epi8(plane[0], each);
            value = _mm_blendv_epi8(value, _mm_shuffle_epi8(plane[1], each), green[part]);
            value = _mm_blendv_epi8(value, _mm_shuffle_epi8(plane[2], each), blue[part]);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(rgb + 3 * i + 16 * part), value);
        }
    }
}

// Byte positions that gather channel c of 64 packed pixels: `first` from bytes 0..127, `second` keeps those and
// takes the rest from bytes 128..191 (a second source counts from 64).
struct Deinterleave {
    alignas(64) std::uint8_t first[3][64];
    alignas(64) std::uint8_t second[3][64];
};

constexpr Deinterleave make_deinterleave() {
    Deinterleave table{};
    for (int c = 0; c < 3; ++c) {
        for (int k = 0; k < 64; ++k) {
            const int at = 3 * k + c;
            table.first[c][k] = static_cast<std::uint8_t>(at < 128 ? at : 0);
            table.second[c][k] = static_cast<std::uint8_t>(at < 128 ? k : at - 128 + 64);
        }
    }
    return table;
}

constexpr Deinterleave kDeinterleave = make_deinterleave();

// `size` colours: a constant lets the compiler keep small palettes in registers. `count` is at least 64.
HISTOSEG_AVX512 HISTOSEG_INLINE bool decode_avx512_sized(const std::uint8_t* rgb, std::size_t count,
                                                         const PaletteTable& palette, int size, std::uint8_t* ids) {
    constexpr std::size_t kStep = 64;
    __m512i first[3], second[3];
    for (int c = 0; c < 3; ++c) {
        first[c] = _mm512_load_si512(kDeinterleave.first[c]);
        second[c] = _mm512_load_si512(kDeinterleave.second[c]);
    }
    __m512i wanted[kMaxClasses][3];
    for (int id = 0; id < size; ++id) {
        for (int c = 0; c < 3; ++c) wanted[id][c] = _mm512_set1_epi8(static_cast<char>(palette.colours[id][c]));
    }
    const __m512i none = _mm512_set1_epi8(-1);
    __mmask64 unmatched = 0;
    for (std::size_t i = 0; i < count; i = next_block(i, kStep, count)) {
        const std::uint8_t* from = rgb + 3 * i;
        const __m512i a = _mm512_loadu_si512(from);
        const __m512i b = _mm512_loadu_si512(from + 64);
        const __m512i d = _mm512_loadu_si512(from + 128);
        __m512i plane[3];
        for (int c = 0; c < 3; ++c) {
            plane[c] = _mm512_permutex2var_epi8(_mm512_permutex2var_epi8(a, first[c], b), second[c], d);
        }
        __m512i found = none;
        for (int id = size - 1; id >= 0; --id) {
            __mmask64 same = _mm512_cmpeq_epi8_mask(plane[0], wanted[id][0]);
            same = _mm512_mask_cmpeq_epi8_mask(same, plane[1], wanted[id][1]);
            same = _mm512_mask_cmpeq_epi8_mask(same, plane[2], wanted[id][2]);
            found = _mm512_mask_blend_epi8(same, found, _mm512_set1_epi8(static_cast<char>(id)));
        }
        unmatched |= _mm512_movepi8_mask(found);
        _mm512_storeu_si512(ids + i, found);
    }
    return unmatched == 0;
}

HISTOSEG_AVX512 bool decode_avx512(const std::uint8_t* rgb, std::size_t count, const PaletteTable& palette,
                                   std::uint8_t* ids) {
    if (count < 64) return decode_avx2(rgb, count, palette, ids);
    switch (palette.size) {
        case 2: return decode_avx512_sized(rgb, count, palette, 2, ids);
        case 3: return decode_avx512_sized(rgb, count, palette, 3, ids);
        case 4: return decode_avx512_sized(rgb, count, palette, 4, ids);
        default: return decode_avx512_sized(rgb, count, palette, palette.size, ids);
    }
}

HISTOSEG_AVX512 void encode_avx512(const std::uint8_t* ids, std::size_t count, const PaletteTable& palette,
                                   std::uint8_t* rgb) {
    constexpr std::size_t kStep = 64;
    static_assert(3 * kMaxClasses <= 128, "the colour table is one two-source byte permutation");
    if (count < kStep) return encode_avx2(ids, count, palette, rgb);
    alignas(64) std::uint8_t table[128] = {};
    for (int id = 0; id < palette.size; ++id) {
        for (int c = 0; c < 3; ++c) table[kMaxClasses * c + id] = palette.colours[id][c];
    }
    const __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + 64);
    for (std::size_t i = 0; i < count; i = next_block(i, kStep, count)) {
        const __m512i block = _mm512_loadu_si512(ids + i);
        for (int part = 0; part < 3; ++part) {
            // Masked, with all bits set: the plain name trips GCC 12's warning about uninitialised variables.
            const __m512i from = _mm512_load_si512(kInterleave64.from[part]);
            const __m512i each = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, from, block);
            const __m512i slot = _mm512_or_si512(each, _mm512_load_si512(kInterleave64.channel[part]));
            _mm512_storeu_si512(rgb + 3 * i + 64 * part, _mm512_permutex2var_epi8(low, slot, high));
        }
    }
}

#endif  // HISTOSEG_MULTIVERSION

}  // namespace

DecodeSpan pick_decode_span() {
#if HISTOSEG_MULTIVERSION
    if (simd_level() == SimdLevel::avx512) return decode_avx512;
    if (simd_level() == SimdLevel::avx2) return decode_avx2;
#endif
    return decode_baseline;
}

EncodeSpan pick_encode_span() {
#if HISTOSEG_MULTIVERSION
    if (simd_level() == SimdLevel::avx512) return encode_avx512;
    if (simd_level() == SimdLevel::avx2) return encode_avx2;
#endif
    return encode_baseline;
}

}  // namespace histoseg
