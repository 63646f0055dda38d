#include "labels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "label_spans.h"
#include "threads.h"

namespace histoseg {

namespace {

// `count` pixels from column x on, packed: in place if they already are, else copied to `packed`.
const std::uint8_t* packed_rgb(const RgbView& rgb, std::int64_t y, std::int64_t x, std::size_t count,
                               std::uint8_t* packed) {
    const std::uint8_t* from = rgb.data + y * rgb.stride_y + x * rgb.stride_x;
    if (rgb.stride_c == 1 && rgb.stride_x == 3) return from;
    for (std::size_t i = 0; i < count; ++i, from += rgb.stride_x) {
        for (int c = 0; c < 3; ++c) packed[3 * i + c] = from[c * rgb.stride_c];
    }
    return packed;
}

const std::uint8_t* packed_ids(const IdsView& ids, std::int64_t y, std::int64_t x, std::size_t count,
                               std::uint8_t* packed) {
    const std::uint8_t* from = ids.data + y * ids.stride_y + x * ids.stride_x;
    if (ids.stride_x == 1) return from;
    for (std::size_t i = 0; i < count; ++i) packed[i] = from[static_cast<std::ptrdiff_t>(i) * ids.stride_x];
    return packed;
}

// The position of the first id that is not below `size`; `count` if there is none.
std::size_t first_bad_id(const std::uint8_t* ids, std::size_t count, std::int32_t size) {
    std::uint8_t highest = 0;
    for (std::size_t i = 0; i < count; ++i) highest = std::max(highest, ids[i]);
    if (highest < size) return count;
    return static_cast<std::size_t>(std::find_if(ids, ids + count, [=](std::uint8_t id) { return id >= size; }) - ids);
}

// Gives the pixels that are exactly no palette colour (kUnmatched in ids so far) their nearest id, or reports them.
// `at` is the position of the first pixel in raster order.
void resolve_span(const std::uint8_t* rgb, std::size_t count, const PaletteTable& palette, std::int32_t max_distance2,
                  std::int64_t at, std::int64_t width, std::uint8_t* ids, DecodeReport& report) {
    for (std::size_t i = 0; i < count; ++i) {
        if (ids[i] != kUnmatched) continue;
        const std::uint8_t* pixel = rgb + 3 * i;
        const Match match = nearest_colour(palette, pixel[0], pixel[1], pixel[2]);
        if (match.distance2 <= max_distance2) {
            ids[i] = static_cast<std::uint8_t>(match.id);
            ++report.approximate;
            continue;
        }
        ++report.unmatched;
        if (report.offender_count < kMaxOffenders) {
            const std::int64_t where = at + static_cast<std::int64_t>(i);
            report.offenders[static_cast<std::size_t>(report.offender_count++)] =
                Offender{where / width, where % width, pixel[0], pixel[1], pixel[2]};
        }
    }
}

// Adds the report of the rows that follow `total`'s.
void append(DecodeReport& total, const DecodeReport& next) {
    total.approximate += next.approximate;
    total.unmatched += next.unmatched;
    for (int i = 0; i < next.offender_count && total.offender_count < kMaxOffenders; ++i) {
        total.offenders[static_cast<std::size_t>(total.offender_count++)] = next.offenders[static_cast<std::size_t>(i)];
    }
}

}  // namespace

std::int32_t tolerance_to_distance2(double tolerance) {
    if (tolerance >= std::sqrt(static_cast<double>(kMaxDistance2))) return kMaxDistance2;
    // tolerance * tolerance may round to just below or above an integer: the square root decides.
    auto distance2 = static_cast<std::int32_t>(tolerance * tolerance) + 1;
    while (std::sqrt(static_cast<double>(distance2)) > tolerance) --distance2;
    return distance2;
}

DecodeReport decode_labels(const RgbView& rgb, const PaletteTable& palette, std::int32_t max_distance2, int threads,
                           std::uint8_t* ids) {
    const DecodeSpan decode_span = pick_decode_span();
    const int chunks = choose_threads(threads, rgb.height, rgb.height * rgb.width);
    std::vector<DecodeReport> reports(static_cast<std::size_t>(chunks));
    // Rows without gaps are one long run: fewer loose ends for the vector loops.
    const bool gapless = rgb.stride_c == 1 && rgb.stride_x == 3 && rgb.stride_y == 3 * rgb.width;
    for_row_chunks(rgb.height, chunks, [&](int chunk, std::int64_t first, std::int64_t last) {
        std::uint8_t buffer[3 * kSpan];
        DecodeReport report;
        const std::int64_t rows_a_run = gapless ? std::max<std::int64_t>(last - first, 1) : 1;
        const std::int64_t run = rows_a_run * rgb.width;
        for (std::int64_t y = first; y < last; y += rows_a_run) {
            for (std::int64_t x = 0; x < run; x += kSpan) {
                const std::size_t count = static_cast<std::size_t>(std::min<std::int64_t>(kSpan, run - x));
                const std::uint8_t* packed = packed_rgb(rgb, y, x, count, buffer);
                const std::int64_t at = y * rgb.width + x;
                if (!decode_span(packed, count, palette, ids + at)) {
                    resolve_span(packed, count, palette, max_distance2, at, rgb.width, ids + at, report);
                }
            }
        }
        reports[static_cast<std::size_t>(chunk)] = report;
    });
    DecodeReport total;
    for (const DecodeReport& report : reports) append(total, report);
    return total;
}

BadId encode_labels(const IdsView& ids, const PaletteTable& palette, int threads, std::uint8_t* rgb) {
    const EncodeSpan encode_span = pick_encode_span();
    const int chunks = choose_threads(threads, ids.height, ids.height * ids.width);
    std::vector<BadId> bad(static_cast<std::size_t>(chunks));
    for_row_chunks(ids.height, chunks, [&](int chunk, std::int64_t first, std::int64_t last) {
        std::uint8_t buffer[kSpan];
        for (std::int64_t y = first; y < last; ++y) {
            for (std::int64_t x = 0; x < ids.width; x += kSpan) {
                const std::size_t count = static_cast<std::size_t>(std::min<std::int64_t>(kSpan, ids.width - x));
                const std::uint8_t* packed = packed_ids(ids, y, x, count, buffer);
                const std::size_t at = first_bad_id(packed, count, palette.size);
                if (at < count) {
                    bad[static_cast<std::size_t>(chunk)] = BadId{y, x + static_cast<std::int64_t>(at), packed[at]};
                    return;
                }
                encode_span(packed, count, palette, rgb + 3 * (y * ids.width + x));
            }
        }
    });
    for (const BadId& one : bad) {
        if (one.y >= 0) return one;
    }
    return BadId{};
}

BadId find_bad_id(const IdsView& ids, std::int32_t size) {
    std::uint8_t buffer[kSpan];
    for (std::int64_t y = 0; y < ids.height; ++y) {
        for (std::int64_t x = 0; x < ids.width; x += kSpan) {
            const std::size_t count = static_cast<std::size_t>(std::min<std::int64_t>(kSpan, ids.width - x));
            const std::uint8_t* packed = packed_ids(ids, y, x, count, buffer);
            const std::size_t at = first_bad_id(packed, count, size);
            if (at < count) return BadId{y, x + static_cast<std::int64_t>(at), packed[at]};
        }
    }
    return BadId{};
}

}  // namespace histoseg
