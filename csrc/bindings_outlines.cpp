// Outlines for Python: checks every argument, releases the GIL, calls plain C++.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "outlines.h"

namespace histoseg {
namespace {

class PyOutlines {
public:
    PyOutlines(std::int64_t width, std::int64_t min_area, bool simplify, std::pair<double, double> scale)
        : tracer_(checked_width(width), {checked_area(min_area), simplify}),
          scale_{checked_scale(scale.first), checked_scale(scale.second)} {}

    py::list add_rows(const py::object& object) {
        const auto ids = checked<std::uint8_t>(object, "ids", 2);
        if (ids.shape(1) != tracer_.width()) {
            fail("ids", "expected rows of " + std::to_string(tracer_.width()) + ", got shape " + shape_text(ids));
        }
        if (finished_) fail("ids", "come after the end of the image");
        if (tracer_.rows() + ids.shape(0) > kMaxCorner) fail("ids", "are more rows than " + std::to_string(kMaxCorner));
        const auto* row = static_cast<const std::uint8_t*>(ids.data());
        const py::ssize_t rows = ids.shape(0), stride_y = ids.strides(0), stride_x = ids.strides(1);
        return polygons([&](std::vector<Piece>& done) {
            for (py::ssize_t y = 0; y < rows; ++y) tracer_.add_row(row + y * stride_y, stride_x, done);
        });
    }

    py::list finish() {
        if (finished_) fail("finish", "the image has been finished before");
        finished_ = true;
        return polygons([&](std::vector<Piece>& done) { tracer_.finish(done); });
    }

private:
    static std::int64_t checked_width(std::int64_t width) {
        if (width < 1 || width > kMaxCorner) {
            fail("width", "expected 1 to " + std::to_string(kMaxCorner) + ", got " + std::to_string(width));
        }
        return width;
    }

    static std::int64_t checked_area(std::int64_t area) {
        if (area < 0) fail("min_area", "expected 0 or more pixels, got " + std::to_string(area));
        return area;
    }

    static double checked_scale(double scale) {
        if (!(scale >= kMinOutlineScale && scale <= kMaxOutlineScale)) {
            fail("scale", "expected " + std::to_string(kMinOutlineScale) + " to " + std::to_string(kMaxOutlineScale) +
                              ", got " + std::to_string(scale));
        }
        return scale;
    }

    // (class, coordinates) of the pieces that `trace` appends.
    template <typename Trace>
    py::list polygons(const Trace& trace) {
        std::vector<Piece> done;
        std::vector<std::string> texts;
        {
            const py::gil_scoped_release released;
            trace(done);
            for (Piece& piece : done) {
                append_coordinates(piece, scale_, texts.emplace_back());
                piece.rings = {};
            }
        }
        py::list list(done.size());
        for (std::size_t i = 0; i < done.size(); ++i) {
            list[i] = py::make_tuple(static_cast<int>(done[i].id), py::bytes(texts[i]));
        }
        return list;
    }

    OutlineTracer tracer_;
    OutlineScale scale_;
    bool finished_ = false;
};

}  // namespace

void bind_outlines(py::module_& m) {
    using namespace pybind11::literals;
    m.attr("max_outline_side") = kMaxCorner;
    py::class_<PyOutlines>(m, "Outlines",
                           "The pieces (connected pixels of one class but 0) of a class map `width` pixels wide that "
                           "comes row by row, as (class, coordinates of a GeoJSON Polygon) in pixels times scale "
                           "(down, across). "
                           "Without those, and without holes, of fewer than min_area pixels. simplify: by up to half "
                           "a pixel, no pixel's centre changes sides; else along pixel edges. For one thread at a time.")
        .def(py::init<std::int64_t, std::int64_t, bool, std::pair<double, double>>(), "width"_a, "min_area"_a,
             "simplify"_a, "scale"_a = std::make_pair(1.0, 1.0))
        .def("add_rows", &PyOutlines::add_rows, "ids"_a,
             "Takes the next rows, uint8 (h, width); the pieces that ended, the same for any cut into bands.")
        .def("finish", &PyOutlines::finish, "Ends the image; all other pieces.");
}

}  // namespace histoseg
