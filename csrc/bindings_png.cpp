// What Python sees of reading PNGs.
#include <string_view>

#include "bindings.h"
#include "png_filters.h"

namespace histoseg {

namespace {

bool py_unfilter_rgb(const py::bytes& rows, const py::object& out_object) {
    const auto given = checked<std::uint8_t>(out_object, "out", 3);
    auto out = checked_output<std::uint8_t>(out_object, "out", {given.shape(0), given.shape(1), 3});
    check_packed_rgb(out, "out");
    const std::string_view bytes = rows;  // CPython keeps a zero behind them, which unfilter_rgb may read
    const std::int64_t height = out.shape(0), width = out.shape(1);
    if (static_cast<std::int64_t>(bytes.size()) != height * (3 * width + 1)) {
        fail("rows", "expected " + std::to_string(height * (3 * width + 1)) + " bytes, got " +
                         std::to_string(bytes.size()));
    }
    auto* target = static_cast<std::uint8_t*>(out.mutable_data());
    const py::gil_scoped_release released;
    return unfilter_rgb(reinterpret_cast<const std::uint8_t*>(bytes.data()), height, width, target, out.strides(0));
}

py::object py_png_pixel_data(const py::bytes& file, std::int64_t start) {
    const std::string_view bytes = file;
    const auto* data = reinterpret_cast<const std::uint8_t*>(bytes.data());
    const auto size = static_cast<std::int64_t>(bytes.size());
    if (start < 0 || start > size) {
        fail("start", "expected 0 to " + std::to_string(size) + ", got " + std::to_string(start));
    }
    const std::int64_t joined = join_pixel_chunks(data, size, start, nullptr);
    if (joined < 0) return py::none();
    // By hand, as py::bytes makes a RuntimeError of Python's MemoryError.
    auto result = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, joined));
    if (!result) throw py::error_already_set();
    auto* out = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(result.ptr()));
    {
        const py::gil_scoped_release released;
        join_pixel_chunks(data, size, start, out);
    }
    return result;
}

}  // namespace

void bind_png(py::module_& m) {
    using namespace pybind11::literals;
    m.def("unfilter_rgb", &py_unfilter_rgb, "rows"_a, "out"_a,
          "Undoes the row filters of inflated 8-bit RGB PNG data, into uint8 (height, width, 3) with rows any distance "
          "apart; whether every filter was known.");
    m.def("png_pixel_data", &py_png_pixel_data, "file"_a, "start"_a,
          "The content of the IDAT chunks of a PNG, joined; None where the file ends within them. Chunks are looked at from "
          "byte `start` on.");
}

}  // namespace histoseg
