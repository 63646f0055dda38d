#include "png_filters.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "host_device.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace histoseg {

namespace {

constexpr int kBytes = 3;  // of a pixel: "left" in the filters is this far away

enum Filter : std::uint8_t { kNone = 0, kSub = 1, kUp = 2, kAverage = 3, kPaeth = 4 };

#if defined(__SSE2__)

// A pixel as 16-bit lanes; the fourth is noise and never stored. Reads the byte behind the pixel too.
__m128i load_pixel(const std::uint8_t* at) {
    std::int32_t bits = 0;
    std::memcpy(&bits, at, kBytes + 1);
    return _mm_unpacklo_epi8(_mm_cvtsi32_si128(bits), _mm_setzero_si128());
}

void store_pixel(std::uint8_t* at, __m128i pixel) {
    const std::int32_t bits = _mm_cvtsi128_si32(_mm_packus_epi16(pixel, pixel));
    std::memcpy(at, &bits, kBytes);
}

__m128i low_byte(__m128i lanes) { return _mm_and_si128(lanes, _mm_set1_epi16(255)); }

__m128i magnitude(__m128i lanes) { return _mm_max_epi16(lanes, _mm_sub_epi16(_mm_setzero_si128(), lanes)); }

__m128i select(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

void unfilter_average(const std::uint8_t* in, const std::uint8_t* above, std::int64_t bytes, std::uint8_t* out) {
    __m128i left = _mm_setzero_si128();
    for (std::int64_t i = 0; i < bytes; i += kBytes) {
        const __m128i mean = _mm_srli_epi16(_mm_add_epi16(left, load_pixel(above + i)), 1);
        left = low_byte(_mm_add_epi16(load_pixel(in + i), mean));
        store_pixel(out + i, left);
    }
}

void unfilter_paeth(const std::uint8_t* in, const std::uint8_t* above, std::int64_t bytes, std::uint8_t* out) {
    __m128i left = _mm_setzero_si128(), corner = _mm_setzero_si128();
    for (std::int64_t i = 0; i < bytes; i += kBytes) {
        const __m128i up = load_pixel(above + i);
        const __m128i from_left = _mm_sub_epi16(up, corner), from_up = _mm_sub_epi16(left, corner);
        const __m128i a = magnitude(from_left), b = magnitude(from_up);
        const __m128i c = magnitude(_mm_add_epi16(from_left, from_up));
        const __m128i least = _mm_min_epi16(c, _mm_min_epi16(a, b));
        const __m128i nearest =
            select(_mm_cmpeq_epi16(a, least), left, select(_mm_cmpeq_epi16(b, least), up, corner));
        left = low_byte(_mm_add_epi16(load_pixel(in + i), nearest));
        store_pixel(out + i, left);
        corner = up;
    }
}

#else

std::uint8_t paeth(int left, int up, int corner) {
    const int a = std::abs(up - corner), b = std::abs(left - corner), c = std::abs(left + up - 2 * corner);
    return static_cast<std::uint8_t>(a <= b && a <= c ? left : b <= c ? up : corner);
}

void unfilter_average(const std::uint8_t* in, const std::uint8_t* above, std::int64_t bytes, std::uint8_t* out) {
    for (std::int64_t i = 0; i < bytes; ++i) {
        const int left = i < kBytes ? 0 : out[i - kBytes];
        out[i] = static_cast<std::uint8_t>(in[i] + (left + above[i]) / 2);
    }
}

void unfilter_paeth(const std::uint8_t* in, const std::uint8_t* above, std::int64_t bytes, std::uint8_t* out) {
    for (std::int64_t i = 0; i < bytes; ++i) {
        const int left = i < kBytes ? 0 : out[i - kBytes], corner = i < kBytes ? 0 : above[i - kBytes];
        out[i] = static_cast<std::uint8_t>(in[i] + paeth(left, above[i], corner));
    }
}

#endif

void unfilter_sub(const std::uint8_t* in, std::int64_t bytes, std::uint8_t* out) {
    std::uint8_t r = 0, g = 0, b = 0;
    for (std::int64_t i = 0; i < bytes; i += kBytes) {
        out[i] = r = static_cast<std::uint8_t>(r + in[i]);
        out[i + 1] = g = static_cast<std::uint8_t>(g + in[i + 1]);
        out[i + 2] = b = static_cast<std::uint8_t>(b + in[i + 2]);
    }
}

void unfilter_up(const std::uint8_t* in, const std::uint8_t* above, std::int64_t bytes, std::uint8_t* out) {
    for (std::int64_t i = 0; i < bytes; ++i) out[i] = static_cast<std::uint8_t>(in[i] + above[i]);
}

}  // namespace

bool unfilter_rgb(const std::uint8_t* rows, std::int64_t height, std::int64_t width, std::uint8_t* out,
                  std::ptrdiff_t out_stride_y) {
    const std::int64_t bytes = kBytes * width;
    const std::vector<std::uint8_t> nothing(static_cast<std::size_t>(bytes) + 1, 0);
    const std::uint8_t* above = nothing.data();
    for (std::int64_t y = 0; y < height; ++y) {
        const std::uint8_t filter = *rows;
        const std::uint8_t* in = rows + 1;
        switch (filter) {
            case kNone: std::copy(in, in + bytes, out); break;
            case kSub: unfilter_sub(in, bytes, out); break;
            case kUp: unfilter_up(in, above, bytes, out); break;
            case kAverage: unfilter_average(in, above, bytes, out); break;
            case kPaeth: unfilter_paeth(in, above, bytes, out); break;
            default: return false;
        }
        above = out;
        rows = in + bytes;
        out += out_stride_y;
    }
    return true;
}

std::int64_t join_pixel_chunks(const std::uint8_t* file, std::int64_t size, std::int64_t start, std::uint8_t* out) {
    constexpr std::int64_t kAround = 12;  // length and kind in front of a chunk's content, its checksum behind
    std::int64_t joined = 0;
    bool found = false;
    for (std::int64_t at = start;;) {
        const bool pixels = at + 8 <= size && std::memcmp(file + at + 4, "IDAT", 4) == 0;
        if (found && !pixels) return joined;
        if (at + 8 > size) return -1;
        const std::int64_t length = std::int64_t{file[at]} << 24 | file[at + 1] << 16 | file[at + 2] << 8 | file[at + 3];
        if (length > size - at - kAround) return -1;
        if (pixels) {
            if (out) std::memcpy(out + joined, file + at + 8, static_cast<std::size_t>(length));
            joined += length;
            found = true;
        }
        at += length + kAround;
    }
}

}  // namespace histoseg
