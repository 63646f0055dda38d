#include "outlines.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "outline_arcs.h"
#include "outline_pieces.h"

namespace histoseg {

namespace {

constexpr std::int16_t kOutside = -1;

// Equal pixels in a row, or the surroundings at its sides. `strand`: the upright boundary at its start, as it grows.
struct Run {
    std::int32_t start;
    std::int16_t id;
    std::int32_t label = kNone;
    std::int32_t strand = kNone;
};

// A row of surroundings alone.
std::vector<Run> outside_row() { return {{-1, kOutside}}; }

}  // namespace

class OutlineTracer::Impl {
public:
    Impl(std::int64_t width, const OutlineOptions& options)
        : width_(static_cast<std::int32_t>(width)), options_(options), arcs_(options.simplify) {}

    void add_row(const std::uint8_t* row, std::ptrdiff_t stride, std::vector<Piece>& done) {
        find_runs(row, stride);
        label_runs();
        advance(done);
    }

    void finish(std::vector<Piece>& done) {
        lower_ = outside_row();
        advance(done);
    }

    std::int32_t width() const { return width_; }
    std::int32_t rows() const { return y_; }

private:
    void find_runs(const std::uint8_t* row, std::ptrdiff_t stride) {
        lower_.assign(1, {-1, kOutside});
        std::int16_t id = kOutside;
        for (std::int32_t x = 0; x < width_; ++x, row += stride) {
            if (*row != id) lower_.push_back({x, id = *row});
        }
        lower_.push_back({width_, kOutside});
    }

    std::int32_t end_of(const std::vector<Run>& runs, std::size_t i) const {
        return i + 1 < runs.size() ? runs[i + 1].start : width_ + 1;
    }

    // Gives each lower run the label of the upper runs of its class that it touches, which become one piece.
    void label_runs() {
        std::size_t i = 0;
        for (std::size_t j = 0; j < lower_.size(); ++j) {
            Run& run = lower_[j];
            if (run.id <= 0) continue;
            const std::int32_t end = end_of(lower_, j);
            while (end_of(upper_, i) <= run.start) ++i;
            for (std::size_t k = i; k < upper_.size() && upper_[k].start < end; ++k) {
                if (upper_[k].id != run.id) continue;
                run.label = run.label == kNone ? upper_[k].label : pieces_.unite(run.label, upper_[k].label);
            }
            if (run.label == kNone) run.label = pieces_.add(static_cast<std::uint8_t>(run.id));
            pieces_.grow(run.label, end - run.start, y_);
        }
    }

    void advance(std::vector<Piece>& done) {
        trace();
        for (const std::int32_t arc : arcs_.finished()) pieces_.add_arc(arc, arcs_[arc].sides);
        arcs_.finished().clear();
        ended_.clear();
        for (const Run& run : upper_) {
            if (run.label != kNone && pieces_.has_ended(run.label, y_)) ended_.push_back(run.label);
        }
        for (const std::int32_t label : ended_) pieces_.take(label, options_.min_area, arcs_, done);
        upper_.swap(lower_);
        ++y_;
    }

    // Follows the boundaries through the corners between the upper and the lower row, from left to right. Only where
    // a run starts is there anything to do; between, a boundary goes straight on.
    void trace() {
        std::size_t i = 0, j = 0;
        std::int32_t across = kNone;  // the level boundary that comes from the left
        while (i + 1 < upper_.size() || j + 1 < lower_.size()) {
            const std::int32_t x = std::min(end_of(upper_, i), end_of(lower_, j));
            const Run &north_west = upper_[i], &south_west = lower_[j];
            const bool north = i + 1 < upper_.size() && upper_[i + 1].start == x;
            const bool south = j + 1 < lower_.size() && lower_[j + 1].start == x;
            const Run& north_east = upper_[i += north];
            Run& south_east = lower_[j += south];
            const bool west = north_west.id != south_west.id, east = north_east.id != south_east.id;
            const Corner here{x, y_};
            const Sides down{south_east.label, south_west.label,
                             south_east.id == kOutside || south_west.id == kOutside};
            const Sides right{north_east.label, south_east.label,
                              north_east.id == kOutside || south_east.id == kOutside};
            const std::int32_t upright = north ? north_east.strand : kNone, level = across;
            if (north + south + west + east > 2) {
                if (north) arcs_.end(upright, here);
                if (west) arcs_.end(level, here);
                if (south) south_east.strand = arcs_.start(here, down);
                across = east ? arcs_.start(here, right) : kNone;
            } else if (south && east) {
                south_east.strand = arcs_.start(here, down);
                across = arcs_.start_twin(south_east.strand, right);
            } else if (north && west) {
                arcs_.join(upright, level, here);
                across = kNone;
            } else if (north && south) {
                south_east.strand = upright;
            } else if (north) {  // and east
                across = arcs_.turn(upright, here);
            } else {  // west and south
                south_east.strand = arcs_.turn(level, here);
                across = kNone;
            }
        }
    }

    std::int32_t width_, y_ = 0;
    OutlineOptions options_;
    PieceTable pieces_;
    ArcTable arcs_;
    std::vector<Run> upper_ = outside_row(), lower_;
    std::vector<std::int32_t> ended_;
};

OutlineTracer::OutlineTracer(std::int64_t width, const OutlineOptions& options)
    : impl_(std::make_unique<Impl>(width, options)) {}
OutlineTracer::~OutlineTracer() = default;

void OutlineTracer::add_row(const std::uint8_t* row, std::ptrdiff_t stride, std::vector<Piece>& done) {
    impl_->add_row(row, stride, done);
}

void OutlineTracer::finish(std::vector<Piece>& done) { impl_->finish(done); }
std::int64_t OutlineTracer::width() const { return impl_->width(); }
std::int64_t OutlineTracer::rows() const { return impl_->rows(); }

namespace {

// Exact and the same everywhere, unlike printf of a double under somebody's locale.
void append_number(std::int32_t half, double scale, std::string& text) {
    constexpr std::int64_t kMillion = 1000000;
    static_assert(kMaxCorner * kMaxOutlineScale * kMillion < 0x1p62);
    const std::int64_t millionths = std::llround(half * (scale * 0.5 * kMillion));
    text += std::to_string(millionths / kMillion);
    std::int64_t fraction = millionths % kMillion;
    if (fraction == 0) return;
    std::string digits = std::to_string(kMillion + fraction);  // a one and six digits
    digits.erase(digits.find_last_not_of('0') + 1);
    digits[0] = '.';
    text += digits;
}

}  // namespace

void append_coordinates(const Piece& piece, const OutlineScale& scale, std::string& text) {
    for (std::size_t i = 0; i < piece.rings.size(); ++i) {
        const Ring& ring = piece.rings[i];
        text += i == 0 ? "[[" : ",[";
        for (std::size_t k = 0; k < ring.size(); ++k) {
            text += k == 0 ? "[" : ",[";
            append_number(ring[k].x, scale.across, text);
            text += ',';
            append_number(ring[k].y, scale.down, text);
            text += ']';
        }
        text += ']';
    }
    text += ']';
}

}  // namespace histoseg
