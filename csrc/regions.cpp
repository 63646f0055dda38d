#include "regions.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace histoseg {

namespace {

void copy_ids(const IdsView& ids, std::uint8_t* out) {
    for (std::int64_t y = 0; y < ids.height; ++y) {
        const std::uint8_t* row = ids.data + y * ids.stride_y;
        for (std::int64_t x = 0; x < ids.width; ++x) *out++ = row[x * ids.stride_x];
    }
}

// The components of a class map as sets of runs (stretches of equal pixels in a row). A component goes by the number
// of its first run, so the order of components is that of their first pixels.
class Components {
public:
    Components(const std::uint8_t* ids, std::int64_t height, std::int64_t width) : width_(width) {
        find_runs(ids, height);
        for (std::size_t i = 0; i + 1 < start_.size(); ++i) {
            parent_.push_back(static_cast<std::int32_t>(i));
            class_.push_back(ids[start_[i]]);
        }
        for_vertical_contacts([this](std::int32_t a, std::int32_t b, std::int32_t) {
            if (class_[a] == class_[b]) join(find(a), find(b));
        });
        size_.resize(parent_.size());
        for (std::int32_t i = 0; i < runs(); ++i) size_[find(i)] += length(i);
    }

    void merge_smaller_than(std::int64_t area) {
        find_borders(area);
        for (std::int32_t i = 0; i < runs(); ++i) {
            if (parent_[i] == i && size_[i] < area) waiting_.emplace(size_[i], i);
        }
        while (!waiting_.empty()) {
            const auto [size, component] = waiting_.top();
            waiting_.pop();
            // An entry is out of date once its component has grown or joined another.
            if (parent_[component] == component && size_[component] == size) give_away(component, area);
        }
    }

    // Writes the classes of runs that have another one now; returns how many pixels those are.
    std::int64_t paint(std::uint8_t* ids) {
        std::int64_t changed = 0;
        for (std::int32_t i = 0; i < runs(); ++i) {
            const std::uint8_t now = class_[find(i)];
            if (ids[start_[i]] == now) continue;
            std::memset(ids + start_[i], now, static_cast<std::size_t>(length(i)));
            changed += length(i);
        }
        return changed;
    }

private:
    static constexpr std::int32_t kNone = -1;

    // A border of a component with the component of `run`, in a list that ends with kNone.
    struct Border {
        std::int32_t run, length, next;
    };

    std::int32_t runs() const { return static_cast<std::int32_t>(parent_.size()); }
    std::int32_t length(std::int32_t run) const { return start_[run + 1] - start_[run]; }

    void find_runs(const std::uint8_t* ids, std::int64_t height) {
        for (std::int64_t y = 0; y < height; ++y) {
            const std::int64_t first = y * width_;
            row_.push_back(static_cast<std::int32_t>(start_.size()));
            start_.push_back(static_cast<std::int32_t>(first));
            for (std::int64_t i = first + 1; i < first + width_; ++i) {
                if (ids[i] != ids[i - 1]) start_.push_back(static_cast<std::int32_t>(i));
            }
        }
        row_.push_back(static_cast<std::int32_t>(start_.size()));
        start_.push_back(static_cast<std::int32_t>(height * width_));
    }

    // Calls visit(upper run, lower run, pixels they share) for runs above each other.
    template <typename Visit>
    void for_vertical_contacts(Visit visit) const {
        const auto width = static_cast<std::int32_t>(width_);
        for (std::size_t y = 0; y + 2 < row_.size(); ++y) {
            for (std::int32_t a = row_[y], b = row_[y + 1]; a < row_[y + 1] && b < row_[y + 2];) {
                const std::int32_t end_a = start_[a + 1] + width, end_b = start_[b + 1];
                visit(a, b, std::min(end_a, end_b) - std::max(start_[a] + width, start_[b]));
                a += end_a <= end_b;
                b += end_b <= end_a;
            }
        }
    }

    std::int32_t find(std::int32_t run) {
        while (parent_[run] != run) run = parent_[run] = parent_[parent_[run]];
        return run;
    }

    std::int32_t join(std::int32_t a, std::int32_t b) {
        const std::int32_t first = std::min(a, b);
        parent_[std::max(a, b)] = first;
        return first;
    }

    void find_borders(std::int64_t area) {
        head_.assign(parent_.size(), kNone);
        tail_.assign(parent_.size(), kNone);
        const auto note = [&](std::int32_t run, std::int32_t other, std::int32_t pixels) {
            const std::int32_t component = find(run);
            if (size_[component] >= area || component == find(other)) return;
            const auto entry = static_cast<std::int32_t>(borders_.size());
            borders_.push_back({other, pixels, head_[component]});
            if (head_[component] == kNone) tail_[component] = entry;
            head_[component] = entry;
        };
        const auto note_both = [&](std::int32_t a, std::int32_t b, std::int32_t pixels) {
            note(a, b, pixels);
            note(b, a, pixels);
        };
        for_vertical_contacts(note_both);
        for (std::size_t y = 0; y + 1 < row_.size(); ++y) {
            for (std::int32_t run = row_[y]; run + 1 < row_[y + 1]; ++run) note_both(run, run + 1, 1);
        }
    }

    // The class that the component shares the longest border with; kNone if it has no neighbour.
    int longest_border(std::int32_t component) {
        std::int64_t votes[256] = {};
        for (std::int32_t i = head_[component]; i != kNone; i = borders_[i].next) {
            const std::int32_t other = find(borders_[i].run);
            if (other != component) votes[class_[other]] += borders_[i].length;
        }
        const std::int64_t* best = std::max_element(votes, votes + 256);
        return *best > 0 ? static_cast<int>(best - votes) : kNone;
    }

    void give_away(std::int32_t component, std::int64_t area) {
        const int chosen = longest_border(component);
        if (chosen == kNone) return;
        const std::int32_t own_head = head_[component];
        std::int32_t merged = component, tail = tail_[component];
        std::int64_t size = size_[component];
        // The list grows at its end by those of the neighbours that join: entries beyond the first `last` are theirs.
        for (std::int32_t i = own_head, last = tail; i != kNone; i = i == last ? kNone : borders_[i].next) {
            const std::int32_t other = find(borders_[i].run);
            if (other == merged || class_[other] != chosen) continue;
            size += size_[other];
            // A list is used only while its component is small, and a large one has none.
            if (head_[other] != kNone) {
                borders_[tail].next = head_[other];
                tail = tail_[other];
            }
            merged = join(merged, other);
            class_[merged] = static_cast<std::uint8_t>(chosen);
        }
        class_[merged] = static_cast<std::uint8_t>(chosen);
        size_[merged] = static_cast<std::int32_t>(size);
        head_[merged] = own_head;
        tail_[merged] = tail;
        if (size < area) waiting_.emplace(size_[merged], merged);
    }

    std::int64_t width_;
    std::vector<std::int32_t> start_;  // by run, and one more: its first pixel in raster order, counted from 0
    std::vector<std::int32_t> row_;    // by row, and one more: its first run
    std::vector<std::int32_t> parent_, size_, head_, tail_;
    std::vector<std::uint8_t> class_;
    std::vector<Border> borders_;
    using Waiting = std::pair<std::int32_t, std::int32_t>;  // size, component
    std::priority_queue<Waiting, std::vector<Waiting>, std::greater<Waiting>> waiting_;
};

// What the rows of a window hold, by class and column, and their sums from the left.
class ColumnCounts {
public:
    ColumnCounts(int classes, std::int64_t width, std::int64_t radius)
        : width_(static_cast<std::size_t>(width)),
          margin_(static_cast<std::size_t>(std::min(radius, width))),
          counts_(static_cast<std::size_t>(classes) * width_),
          sums_(width_ + 2 * margin_ + 1) {}

    // Adds `step` (1 or -1) for each pixel of a row.
    void count_row(const std::uint8_t* row, std::int32_t step) {
        for (std::size_t c = 0; c * width_ < counts_.size(); ++c) {
            std::int32_t* counts = counts_.data() + c * width_;
            for (std::size_t x = 0; x < width_; ++x) counts[x] += row[x] == static_cast<std::uint8_t>(c) ? step : 0;
        }
    }

    // Puts the class's claim to each pixel in place of a lower one. Claims compare as count, own class, lower class.
    void claim(int c, const std::uint8_t* own, std::int32_t* best) {
        const std::int32_t* counts = counts_.data() + static_cast<std::size_t>(c) * width_;
        // Sums from the left, level beyond both edges, so that windows cut there need no case of their own.
        std::int32_t sum = 0;
        for (std::size_t x = 0; x < width_; ++x) sums_[margin_ + 1 + x] = sum += counts[x];
        std::fill(sums_.end() - static_cast<std::ptrdiff_t>(margin_), sums_.end(), sum);
        const std::int32_t* left = sums_.data();
        const std::int32_t* right = left + 2 * margin_ + 1;
        const std::int32_t last = kMaxClasses - 1 - c;
        for (std::size_t x = 0; x < width_; ++x) {
            const std::int32_t mine = (right[x] - left[x]) * (2 * kMaxClasses) + (own[x] == c ? kMaxClasses : 0) + last;
            best[x] = best[x] > mine ? best[x] : mine;
        }
    }

private:
    std::size_t width_, margin_;
    std::vector<std::int32_t> counts_, sums_;
};

static_assert(std::int64_t{2 * kMaxMajorityRadius + 1} * (2 * kMaxMajorityRadius + 1) * 2 * kMaxClasses < (1ll << 31) &&
                  (kMaxClasses & (kMaxClasses - 1)) == 0,
              "claims are 31 bits, their lowest ones the class");

}  // namespace

std::int64_t remove_islands(const IdsView& ids, std::int64_t area, std::uint8_t* out) {
    copy_ids(ids, out);
    if (area <= 1 || ids.height == 0 || ids.width == 0) return 0;
    Components components(out, ids.height, ids.width);
    components.merge_smaller_than(area);
    return components.paint(out);
}

void majority(const IdsView& ids, std::int64_t radius, int classes, std::uint8_t* out) {
    copy_ids(ids, out);
    if (radius == 0 || ids.height == 0 || ids.width == 0) return;
    const std::int64_t height = ids.height, width = ids.width;
    const std::vector<std::uint8_t> before(out, out + height * width);
    ColumnCounts columns(classes, width, radius);
    std::vector<std::int32_t> best(static_cast<std::size_t>(width));
    for (std::int64_t y = 0; y < std::min(radius, height); ++y) columns.count_row(before.data() + y * width, 1);
    for (std::int64_t y = 0; y < height; ++y) {
        if (y + radius < height) columns.count_row(before.data() + (y + radius) * width, 1);
        if (y > radius) columns.count_row(before.data() + (y - radius - 1) * width, -1);
        std::fill(best.begin(), best.end(), 0);
        for (int c = 0; c < classes; ++c) columns.claim(c, before.data() + y * width, best.data());
        std::uint8_t* row = out + y * width;
        for (std::int64_t x = 0; x < width; ++x) {
            row[x] = static_cast<std::uint8_t>(kMaxClasses - 1 - (best[x] & (kMaxClasses - 1)));
        }
    }
}

}  // namespace histoseg
