// What Python sees of the C++ core: checks every argument, releases the GIL, calls plain C++.
#include "bindings.h"

#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <vector>

#include "crf.h"
#include "labels.h"
#include "overlay.h"
#include "regions.h"
#include "resample.h"
#include "simd.h"
#include "stitch.h"
#include "threads.h"

namespace histoseg {
namespace {

void check_threads(int threads) {
    if (threads < 0 || threads > kMaxThreads) {
        fail("threads", "expected 0 (choose) to " + std::to_string(kMaxThreads) + ", got " + std::to_string(threads));
    }
}

void check_bad_id(const BadId& bad, const char* name, std::int32_t size) {
    if (bad.y < 0) return;
    fail(name, "id " + std::to_string(bad.value) + " at x=" + std::to_string(bad.x) + ", y=" + std::to_string(bad.y) +
                   " has no colour; the palette ends at " + std::to_string(size - 1));
}

IdsView ids_view(const py::array& ids) {
    return {static_cast<const std::uint8_t*>(ids.data()), ids.shape(0), ids.shape(1), ids.strides(0), ids.strides(1)};
}

py::array_t<std::int64_t> offenders_array(const DecodeReport& report) {
    py::array_t<std::int64_t> rows({static_cast<py::ssize_t>(report.offender_count), py::ssize_t{5}});
    auto cell = rows.mutable_unchecked<2>();
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
        const Offender& one = report.offenders[static_cast<std::size_t>(i)];
        const std::int64_t values[5] = {one.y, one.x, one.r, one.g, one.b};
        for (py::ssize_t k = 0; k < 5; ++k) cell(i, k) = values[k];
    }
    return rows;
}

py::tuple py_decode_labels(const py::object& rgb_object, const py::object& palette_object, double tolerance,
                           int threads) {
    const auto rgb = checked<std::uint8_t>(rgb_object, "rgb", 3);
    if (rgb.shape(2) != 3 && rgb.shape(2) != 4) {
        fail("rgb", "expected shape (height, width, 3 or 4), got " + shape_text(rgb));
    }
    const PaletteTable palette = checked_palette(palette_object);
    if (!(tolerance >= 0)) fail("tolerance", "expected a number of 0 or more, got " + std::to_string(tolerance));
    check_threads(threads);
    const RgbView view{static_cast<const std::uint8_t*>(rgb.data()), rgb.shape(0), rgb.shape(1),
                       rgb.strides(0), rgb.strides(1), rgb.strides(2)};
    py::array_t<std::uint8_t> ids({rgb.shape(0), rgb.shape(1)});
    std::uint8_t* out = ids.mutable_data();
    DecodeReport report;
    {
        const py::gil_scoped_release released;
        report = decode_labels(view, palette, tolerance_to_distance2(tolerance), threads, out);
    }
    return py::make_tuple(ids, report.approximate, report.unmatched, offenders_array(report));
}

py::array_t<std::uint8_t> py_encode_labels(const py::object& ids_object, const py::object& palette_object,
                                           int threads) {
    const auto ids = checked<std::uint8_t>(ids_object, "ids", 2);
    const PaletteTable palette = checked_palette(palette_object);
    check_threads(threads);
    const IdsView view = ids_view(ids);
    py::array_t<std::uint8_t> rgb({ids.shape(0), ids.shape(1), py::ssize_t{3}});
    std::uint8_t* out = rgb.mutable_data();
    BadId bad;
    {
        const py::gil_scoped_release released;
        bad = encode_labels(view, palette, threads, out);
    }
    check_bad_id(bad, "ids", palette.size);
    return rgb;
}

Core checked_core(const py::object& object, const LogitsView& tile) {
    if (!py::isinstance<py::sequence>(object) || py::len(object) != 4) fail("core", "expected (y0, x0, y1, x1)");
    std::int64_t edge[4];
    for (std::size_t i = 0; i < 4; ++i) {
        // Not pybind's cast alone: NumPy integers are welcome, floats are not.
        const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(py::sequence(object)[i].ptr()));
        if (!index) {
            PyErr_Clear();
            fail("core", "expected four integers");
        }
        edge[i] = PyLong_AsLongLong(index.ptr());
        if (PyErr_Occurred() != nullptr) {
            PyErr_Clear();
            fail("core", "is outside the tile");
        }
    }
    const Core core{edge[0], edge[1], edge[2], edge[3]};
    if (core.y0 < 0 || core.x0 < 0 || core.y1 < core.y0 || core.x1 < core.x0 || core.y1 > tile.height ||
        core.x1 > tile.width) {
        fail("core", py::str(object).cast<std::string>() + " is not inside the tile of " + std::to_string(tile.height) +
                         " x " + std::to_string(tile.width));
    }
    return core;
}

py::array checked_logits(const py::object& object, py::ssize_t ndim = 3) {
    auto logits = checked<float>(object, "logits", ndim);
    check_contiguous(logits, "logits", ndim - 1, sizeof(float));
    if (logits.shape(0) < 1 || logits.shape(0) > kMaxClasses) {
        fail("logits", "expected 1 to " + std::to_string(kMaxClasses) + " classes, got shape " + shape_text(logits));
    }
    return logits;
}

LogitsView logits_view(const py::array& logits) {
    return {static_cast<const float*>(logits.data()), logits.shape(0), logits.shape(1), logits.shape(2),
            logits.strides(0), logits.strides(1)};
}

// Of logits before a pixel shuffle, (classes, 2, 2, height / 2, width / 2).
LogitsView phases_view(const py::array& logits) {
    if (logits.shape(1) != 2 || logits.shape(2) != 2) {
        fail("logits", "expected shape (classes, 2, 2, height / 2, width / 2), got " + shape_text(logits));
    }
    return {static_cast<const float*>(logits.data()), logits.shape(0), 2 * logits.shape(3), 2 * logits.shape(4),
            logits.strides(0), logits.strides(3), 2, logits.strides(1), logits.strides(2)};
}

std::int64_t py_stitch(const py::object& logits_object, const py::object& core_object, const py::object& classes_object,
                       const py::object& counts_object, const py::object& confidence_object,
                       const py::object& probabilities_object) {
    const bool phases = py::isinstance<py::array>(logits_object) &&
                        py::reinterpret_borrow<py::array>(logits_object).ndim() == 5;
    const auto logits = checked_logits(logits_object, phases ? 5 : 3);
    const LogitsView view = phases ? phases_view(logits) : logits_view(logits);
    const Core core = checked_core(core_object, view);
    const py::ssize_t count = logits.shape(0), height = core.y1 - core.y0, width = core.x1 - core.x0;
    auto classes = checked_output<std::uint8_t>(classes_object, "classes", {height, width});
    auto counts = checked_output<std::uint64_t>(counts_object, "counts", {count});
    auto confidence = checked_output<std::uint64_t>(confidence_object, "confidence", {count});
    StitchOutput output{};
    output.classes = static_cast<std::uint8_t*>(classes.mutable_data());
    output.classes_stride_y = classes.strides(0);
    output.counts = static_cast<std::uint64_t*>(counts.mutable_data());
    output.confidence = static_cast<std::uint64_t*>(confidence.mutable_data());
    if (!probabilities_object.is_none()) {
        auto planes = checked_output<std::uint8_t>(probabilities_object, "probabilities", {count, height, width});
        output.probabilities = static_cast<std::uint8_t*>(planes.mutable_data());
        output.probabilities_stride_class = planes.strides(0);
        output.probabilities_stride_y = planes.strides(1);
    }
    const py::gil_scoped_release released;
    return stitch(view, core, output);
}

void py_tint(const py::object& rgb_object, const py::object& ids_object, const py::object& above_object,
             const py::object& palette_object, int alpha, const py::object& out_object) {
    const auto ids = checked<std::uint8_t>(ids_object, "ids", 2);
    const py::ssize_t height = ids.shape(0), width = ids.shape(1);
    check_contiguous(ids, "ids", 1, 1);
    const auto rgb = checked<std::uint8_t>(rgb_object, "rgb", 3);
    check_shape(rgb, "rgb", {height, width, 3});
    check_packed_rgb(rgb, "rgb");
    auto out = checked_output<std::uint8_t>(out_object, "out", {height, width, 3});
    check_packed_rgb(out, "out");
    const PaletteTable palette = checked_palette(palette_object);
    if (alpha < 0 || alpha > 255) fail("alpha", "expected 0 to 255, got " + std::to_string(alpha));
    check_bad_id(find_bad_id(ids_view(ids), palette.size), "ids", palette.size);
    TintBand band{};
    if (!above_object.is_none()) {
        const auto above = checked<std::uint8_t>(above_object, "above", 1);
        check_shape(above, "above", {width});
        check_contiguous(above, "above", 0, 1);
        band.above = static_cast<const std::uint8_t*>(above.data());
        const IdsView row{band.above, 1, width, width, 1};
        check_bad_id(find_bad_id(row, palette.size), "above", palette.size);
    }
    band.rgb = static_cast<const std::uint8_t*>(rgb.data());
    band.rgb_stride_y = rgb.strides(0);
    band.ids = static_cast<const std::uint8_t*>(ids.data());
    band.ids_stride_y = ids.strides(0);
    band.out = static_cast<std::uint8_t*>(out.mutable_data());
    band.out_stride_y = out.strides(0);
    band.height = height;
    band.width = width;
    const py::gil_scoped_release released;
    tint(band, palette, static_cast<std::uint8_t>(alpha));
}

void check_pixels(const py::array& array, const char* name, std::int64_t pixels, std::int64_t most) {
    if (pixels > most) {
        fail(name, "expected at most " + std::to_string(most) + " pixels, got shape " + shape_text(array));
    }
}

py::tuple py_remove_islands(const py::object& ids_object, std::int64_t area) {
    const auto ids = checked<std::uint8_t>(ids_object, "ids", 2);
    check_pixels(ids, "ids", ids.size(), kMaxRegionPixels);
    if (area < 0) fail("area", "expected 0 or more pixels, got " + std::to_string(area));
    const IdsView view = ids_view(ids);
    py::array_t<std::uint8_t> out({ids.shape(0), ids.shape(1)});
    std::uint8_t* to = out.mutable_data();
    std::int64_t changed = 0;
    {
        const py::gil_scoped_release released;
        changed = remove_islands(view, area, to);
    }
    return py::make_tuple(out, changed);
}

py::array_t<std::uint8_t> py_majority(const py::object& ids_object, std::int64_t radius, int classes) {
    const auto ids = checked<std::uint8_t>(ids_object, "ids", 2);
    check_pixels(ids, "ids", ids.size(), kMaxRegionPixels);
    if (radius < 0 || radius > kMaxMajorityRadius) {
        fail("radius", "expected 0 to " + std::to_string(kMaxMajorityRadius) + ", got " + std::to_string(radius));
    }
    if (classes < 1 || classes > kMaxClasses) {
        fail("classes", "expected 1 to " + std::to_string(kMaxClasses) + ", got " + std::to_string(classes));
    }
    const IdsView view = ids_view(ids);
    check_bad_id(find_bad_id(view, classes), "ids", classes);
    py::array_t<std::uint8_t> out({ids.shape(0), ids.shape(1)});
    std::uint8_t* to = out.mutable_data();
    const py::gil_scoped_release released;
    majority(view, radius, classes, to);
    return out;
}

void check_range(double value, const char* name, double least, double most) {
    if (value >= least && value <= most) return;
    fail(name, "expected " + std::string(py::str(py::float_(least))) + " to " +
                   std::string(py::str(py::float_(most))) + ", got " + std::string(py::str(py::float_(value))));
}

CrfOptions checked_crf_options(int iterations, double smooth_weight, double smooth_sigma, double appearance_weight,
                               double appearance_sigma_xy, double appearance_sigma_rgb) {
    check_range(iterations, "iterations", 0, kMaxCrfIterations);
    check_range(smooth_weight, "smooth_weight", 0, kMaxCrfWeight);
    check_range(smooth_sigma, "smooth_sigma", kMinCrfSigma, kMaxCrfSigma);
    check_range(appearance_weight, "appearance_weight", 0, kMaxCrfWeight);
    check_range(appearance_sigma_xy, "appearance_sigma_xy", kMinCrfSigma, kMaxCrfSigma);
    check_range(appearance_sigma_rgb, "appearance_sigma_rgb", kMinCrfSigma, kMaxCrfSigma);
    return {iterations, static_cast<float>(smooth_weight), static_cast<float>(smooth_sigma),
            static_cast<float>(appearance_weight), static_cast<float>(appearance_sigma_xy),
            static_cast<float>(appearance_sigma_rgb)};
}

py::array_t<float> py_dense_crf(const py::object& rgb_object, const py::object& logits_object, int iterations,
                                double smooth_weight, double smooth_sigma, double appearance_weight,
                                double appearance_sigma_xy, double appearance_sigma_rgb, int threads) {
    const auto logits = checked_logits(logits_object);
    check_pixels(logits, "logits", logits.shape(1) * logits.shape(2), kMaxCrfPixels);
    const auto rgb = checked<std::uint8_t>(rgb_object, "rgb", 3);
    check_shape(rgb, "rgb", {logits.shape(1), logits.shape(2), 3});
    const CrfOptions options = checked_crf_options(iterations, smooth_weight, smooth_sigma, appearance_weight,
                                                   appearance_sigma_xy, appearance_sigma_rgb);
    check_threads(threads);
    const RgbView colours{static_cast<const std::uint8_t*>(rgb.data()), rgb.shape(0), rgb.shape(1),
                          rgb.strides(0), rgb.strides(1), rgb.strides(2)};
    const LogitsView view = logits_view(logits);
    py::array_t<float> probabilities({logits.shape(0), logits.shape(1), logits.shape(2)});
    float* out = probabilities.mutable_data();
    bool finite = false;
    {
        const py::gil_scoped_release released;
        finite = dense_crf(colours, view, options, threads, out);
    }
    if (!finite) fail("logits", "hold a value that is not finite, which would spread over the whole image");
    return probabilities;
}

// Views of the caller's arrays, which have to outlive them.
Taps checked_taps(const py::object& firsts, const py::object& shares, const char* name, std::int64_t size) {
    const auto first = checked<std::int32_t>(firsts, name, 1);
    const auto weights = checked<std::uint16_t>(shares, name, 2);
    check_contiguous(first, name, 0, sizeof(std::int32_t));
    if (weights.shape(0) != first.shape(0) || (weights.flags() & py::array::c_style) == 0) {
        fail(name, "expected contiguous weights, a row for each of first");
    }
    const Taps taps{static_cast<const std::int32_t*>(first.data()), static_cast<const std::uint16_t*>(weights.data()),
                    first.shape(0), weights.shape(1)};
    if (!taps_fit(taps, size)) fail(name, "a tap lies outside of the source, or weights do not add up");
    return taps;
}

void py_resample(const py::object& source_object, const py::object& row_first, const py::object& row_weights,
                 const py::object& column_first, const py::object& column_weights, const py::object& out_object) {
    const auto source = checked<std::uint8_t>(source_object, "source", 3);
    check_shape(source, "source", {source.shape(0), source.shape(1), 3});
    check_packed_rgb(source, "source");
    const Taps rows = checked_taps(row_first, row_weights, "rows", source.shape(0));
    const Taps columns = checked_taps(column_first, column_weights, "columns", source.shape(1));
    auto out = checked_output<std::uint8_t>(out_object, "out", {rows.count, columns.count, 3});
    check_packed_rgb(out, "out");
    const ResampleView view{static_cast<const std::uint8_t*>(source.data()), source.strides(0), source.shape(0),
                            source.shape(1), static_cast<std::uint8_t*>(out.mutable_data()), out.strides(0)};
    const py::gil_scoped_release released;
    resample(view, rows, columns);
}

void py_set_simd_level(const std::string& name) {
    SimdLevel level{};
    if (!parse_simd_level(name, level)) fail("level", "expected baseline, avx2 or avx512, got " + name);
    if (level > best_simd_level()) fail("level", "this machine has no " + name);
    set_simd_level(level);
}

}  // namespace
}  // namespace histoseg

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    using namespace histoseg;
    using namespace pybind11::literals;
    m.doc() = "C++ core of histoseg-fast: labels, stitching, overlays, post-processing, outlines. Wrong arguments raise "
              "ValueError.";
    m.attr("max_classes") = kMaxClasses;
    m.attr("max_threads") = kMaxThreads;
    m.attr("unmatched") = static_cast<int>(kUnmatched);
    m.attr("confidence_units") = kConfidenceUnits;
    m.attr("max_region_pixels") = kMaxRegionPixels;
    m.attr("resample_one") = kResampleOne;
    m.attr("max_majority_radius") = kMaxMajorityRadius;
    m.attr("max_crf_pixels") = kMaxCrfPixels;
    m.attr("max_crf_iterations") = kMaxCrfIterations;
    m.attr("max_crf_weight") = kMaxCrfWeight;
    m.attr("min_crf_sigma") = kMinCrfSigma;
    m.attr("max_crf_sigma") = kMaxCrfSigma;
    m.def("decode_labels", &py_decode_labels, "rgb"_a, "palette"_a, "tolerance"_a = 0.0, "threads"_a = 0,
          "(ids, approximate, unmatched, offenders) of a uint8 (height, width, 3 or 4) label; offenders are int64 rows "
          "y, x, r, g, b of the first unmatched pixels.");
    m.def("encode_labels", &py_encode_labels, "ids"_a, "palette"_a, "threads"_a = 0,
          "The uint8 (height, width, 3) colours of uint8 (height, width) ids.");
    m.def("stitch", &py_stitch, "logits"_a, "core"_a, "classes"_a, "counts"_a, "confidence"_a,
          "probabilities"_a = py::none(),
          "Writes the classes of core (y0, x0, y1, x1) of float32 (classes, height, width) logits, adds to counts and "
          "confidence (uint64 by class), returns how many of its pixels have a logit that is not finite. Logits may be "
          "as before a pixel shuffle, (classes, 2, 2, height / 2, width / 2).");
    m.def("tint", &py_tint, "rgb"_a, "ids"_a, "above"_a, "palette"_a, "alpha"_a, "out"_a,
          "Blends class colours (alpha 0..255) and outlines over rgb, into out (which may be rgb).");
    m.def("remove_islands", &py_remove_islands, "ids"_a, "area"_a,
          "(ids, changed) of uint8 (height, width) ids: components of fewer than area pixels join the class that they "
          "share the longest border with, smallest first; changed is a number of pixels.");
    m.def("majority", &py_majority, "ids"_a, "radius"_a, "classes"_a,
          "The most frequent class in the window of 2 * radius + 1 pixels a side around each pixel of uint8 ids.");
    m.def("dense_crf", &py_dense_crf, "rgb"_a, "logits"_a, "iterations"_a, "smooth_weight"_a, "smooth_sigma"_a,
          "appearance_weight"_a, "appearance_sigma_xy"_a, "appearance_sigma_rgb"_a, "threads"_a = 0,
          "float32 (classes, height, width) probabilities: the mean field of a dense CRF over logits of that shape and "
          "a uint8 (height, width, 3) image; sigmas in pixels and in grey levels.");
    m.def("resample", &py_resample, "source"_a, "row_first"_a, "row_weights"_a, "column_first"_a, "column_weights"_a,
          "out"_a, "Resamples RGB rows into out: output i along an axis is the mean of the sources from first[i] on, by "
          "weights[i] (uint16, adding up to resample_one).");
    m.def("simd_level", [] { return simd_level_name(simd_level()); }, "The SIMD level in use.");
    m.def("best_simd_level", [] { return simd_level_name(best_simd_level()); }, "The best level of this machine.");
    m.def("set_simd_level", &py_set_simd_level, "level"_a,
          "For tests: use 'baseline', 'avx2' or 'avx512'. Answers do not depend on it.");
    bind_cuda(m);
    bind_layers(m);
    bind_outlines(m);
    bind_png(m);
}
