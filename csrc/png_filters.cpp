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

// Reads the byte behind the pixel too.
__m128i load_pixel(const std::uint8_t* at) {
    std::int32_t bits = 0;
    std::memcpy(&bits, at, kBytes + 1);
    return _mm_cvtsi32_si128(bits);
}

__m128i magnitude(__m128i lanes) { return _mm_max_epi16(lanes, _mm_sub_epi16(_mm_setzero_si128(), lanes)); }

__m128i select(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

__m128i paeth(__m128i left, __m128i up, __m128i corner) {
    const __m128i from_left = _mm_sub_epi16(up, corner), from_up = _mm_sub_epi16(left, corner);
    const __m128i a = magnitude(from_left), b = magnitude(from_up);
    const __m128i c = magnitude(_mm_add_epi16(from_left, from_up));
    const __m128i least = _mm_min_epi16(c, _mm_min_epi16(a, b));
    return select(_mm_cmpeq_epi16(a, least), left, select(_mm_cmpeq_epi16(b, least), up, corner));
}

// Pixels that want the one to their left wait for it; so `kRows` rows, 1 or even, are worked on in step, each one pixel
// behind the row above. A register holds two pixels, of two rows, as 16-bit lanes; the fourth lane of each is noise.
// What is above a pixel the row above has just given: only the first row reads it from memory.
template <int kRows>
class RowsInStep {
  public:
    // `in`: the rows' filter types, kAverage or kPaeth, each with `bytes` bytes behind. `out[0]` is the row above them,
    // `out[1 + i]` row i of the output.
    RowsInStep(const std::uint8_t* in, std::int64_t bytes, std::uint8_t* const* out)
        : in_(in), bytes_(bytes), out_(out) {}

    void unfilter() {
        int paeths = 0;
        for (int pair = 0; pair < kPairs; ++pair) {
            std::int64_t masks[2] = {0, 0};
            for (int i = 0; i < 2 && 2 * pair + i < kRows; ++i) {
                const bool is_paeth = in_[(2 * pair + i) * (bytes_ + 1)] == kPaeth;
                masks[i] = -static_cast<std::int64_t>(is_paeth);
                paeths += is_paeth;
            }
            is_paeth_[pair] = _mm_set_epi64x(masks[1], masks[0]);
            left_[pair] = corner_[pair] = _mm_setzero_si128();
        }
        if (paeths == 0) {
            run<kAverage>();
        } else if (paeths == kRows) {
            run<kPaeth>();
        } else {
            run<kMixed>();
        }
    }

  private:
    static constexpr int kPairs = (kRows + 1) / 2, kMixed = -1;

    template <int kFilter>
    void run() {
        constexpr std::int64_t kBehind = kBytes * (kRows - 1);
        std::int64_t at = 0;
        for (; at < std::min(kBehind, bytes_); at += kBytes) step<kFilter, false>(at);
        for (; at < bytes_ - kBytes; at += kBytes) step<kFilter, true>(at);
        for (; at < bytes_ + kBehind; at += kBytes) step<kFilter, false>(at);
    }

    // Byte `at` of the first row. Unless `kAll`, some rows have not begun or are over: they get zeros and store nothing.
    // Else no row is at its last pixel, and may store the byte behind its pixel, which it has not come to yet.
    template <int kFilter, bool kAll>
    void step(std::int64_t at) {
        const __m128i zero = _mm_setzero_si128();
        __m128i up[kPairs];
        up[0] = inside<kAll>(0, at) ? _mm_unpacklo_epi8(load_pixel(out_[0] + at), zero) : zero;
        for (int pair = 1; pair < kPairs; ++pair) up[pair] = _mm_unpackhi_epi64(left_[pair - 1], zero);
        for (int pair = 0; pair < kPairs; ++pair) {
            up[pair] = _mm_unpacklo_epi64(up[pair], left_[pair]);
            const __m128i pixels = _mm_unpacklo_epi32(given<kAll>(2 * pair, at), given<kAll>(2 * pair + 1, at));
            __m128i nearest = zero, mean = zero;
            if (kFilter != kAverage) nearest = paeth(left_[pair], up[pair], corner_[pair]);
            if (kFilter != kPaeth) mean = _mm_srli_epi16(_mm_add_epi16(left_[pair], up[pair]), 1);
            const __m128i estimate = kFilter == kPaeth     ? nearest
                                     : kFilter == kAverage ? mean
                                                           : select(is_paeth_[pair], nearest, mean);
            left_[pair] = _mm_and_si128(_mm_add_epi16(_mm_unpacklo_epi8(pixels, zero), estimate), _mm_set1_epi16(255));
            corner_[pair] = up[pair];
            const __m128i packed = _mm_packus_epi16(left_[pair], left_[pair]);
            store<kAll>(2 * pair, at, _mm_cvtsi128_si32(packed));
            store<kAll>(2 * pair + 1, at, _mm_cvtsi128_si32(_mm_srli_si128(packed, 4)));
        }
    }

    template <bool kAll>
    bool inside(int row, std::int64_t at) const {
        return row < kRows && (kAll || (at >= kBytes * row && at < bytes_ + kBytes * row));
    }

    template <bool kAll>
    __m128i given(int row, std::int64_t at) const {
        if (!inside<kAll>(row, at)) return _mm_setzero_si128();
        return load_pixel(in_ + row * (bytes_ + 1) + 1 + at - kBytes * row);
    }

    template <bool kAll>
    void store(int row, std::int64_t at, std::int32_t pixel) const {
        if (inside<kAll>(row, at)) std::memcpy(out_[1 + row] + at - kBytes * row, &pixel, kAll ? kBytes + 1 : kBytes);
    }

    const std::uint8_t* in_;
    std::int64_t bytes_;
    std::uint8_t* const* out_;
    __m128i left_[kPairs], corner_[kPairs], is_paeth_[kPairs];
};

#else

int paeth(int left, int up, int corner) {
    const int a = std::abs(up - corner), b = std::abs(left - corner), c = std::abs(left + up - 2 * corner);
    return a <= b && a <= c ? left : b <= c ? up : corner;
}

// See above: here, one row after the other, byte by byte.
template <int kRows>
class RowsInStep {
  public:
    RowsInStep(const std::uint8_t* in, std::int64_t bytes, std::uint8_t* const* out)
        : in_(in), bytes_(bytes), out_(out) {}

    void unfilter() {
        for (int row = 0; row < kRows; ++row) {
            const std::uint8_t *in = in_ + row * (bytes_ + 1) + 1, *above = out_[row];
            std::uint8_t* out = out_[row + 1];
            for (std::int64_t i = 0; i < bytes_; ++i) {
                const int left = i < kBytes ? 0 : out[i - kBytes], corner = i < kBytes ? 0 : above[i - kBytes];
                const int estimate = in[-1] == kPaeth ? paeth(left, above[i], corner) : (left + above[i]) / 2;
                out[i] = static_cast<std::uint8_t>(in[i] + estimate);
            }
        }
    }

  private:
    const std::uint8_t* in_;
    std::int64_t bytes_;
    std::uint8_t* const* out_;
};

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

constexpr int kMostRows = 4;

bool wants_left_and_up(std::uint8_t filter) { return filter == kAverage || filter == kPaeth; }

}  // namespace

bool unfilter_rgb(const std::uint8_t* rows, std::int64_t height, std::int64_t width, std::uint8_t* out,
                  std::ptrdiff_t out_stride_y) {
    const std::int64_t bytes = kBytes * width;
    std::vector<std::uint8_t> nothing(static_cast<std::size_t>(bytes) + 1, 0);
    std::uint8_t* above = nothing.data();
    for (std::int64_t y = 0; y < height;) {
        const std::uint8_t* in = rows + y * (bytes + 1);
        std::uint8_t* lines[1 + kMostRows] = {above};
        int together = 0;
        while (together < kMostRows && y + together < height && wants_left_and_up(in[together * (bytes + 1)])) {
            lines[together + 1] = out + together * out_stride_y;
            ++together;
        }
        int done = 1;
        if (together == kMostRows) {
            RowsInStep<kMostRows>(in, bytes, lines).unfilter();
            done = kMostRows;
        } else if (together >= 2) {
            RowsInStep<2>(in, bytes, lines).unfilter();
            done = 2;
        } else if (together == 1) {
            RowsInStep<1>(in, bytes, lines).unfilter();
        } else {
            switch (*in) {
                case kNone: std::copy(in + 1, in + 1 + bytes, out); break;
                case kSub: unfilter_sub(in + 1, bytes, out); break;
                case kUp: unfilter_up(in + 1, above, bytes, out); break;
                default: return false;
            }
        }
        y += done;
        out += done * out_stride_y;
        above = out - out_stride_y;
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
