// What the bindings files share; they alone know Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "labels_pixel.h"

namespace py = pybind11;

namespace histoseg {

// In bindings_cuda.cpp, bindings_layers.cpp and bindings_outlines.cpp.
void bind_cuda(py::module_& m);
void bind_layers(py::module_& m);
void bind_outlines(py::module_& m);

[[noreturn]] inline void fail(const std::string& name, const std::string& what) {
    throw py::value_error(name + ": " + what);
}

inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// `object` as an aligned array of exactly T and `ndim` axes; no conversions, so that outputs are the caller's memory.
template <typename T>
py::array checked(const py::object& object, const char* name, py::ssize_t ndim) {
    if (!py::isinstance<py::array>(object)) fail(name, "expected a NumPy array");
    auto array = py::reinterpret_borrow<py::array>(object);
    const std::string wanted = py::str(py::dtype::of<T>()).cast<std::string>();
    if (!py::isinstance<py::array_t<T>>(object)) {
        fail(name, "expected dtype " + wanted + ", got " + py::str(array.dtype()).cast<std::string>());
    }
    if (array.ndim() != ndim) fail(name, "expected " + std::to_string(ndim) + " axes, got shape " + shape_text(array));
    if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) fail(name, "is not aligned to its dtype");
    return array;
}

inline PaletteTable checked_palette(const py::object& object) {
    const auto array = checked<std::uint8_t>(object, "palette", 2);
    if (array.shape(0) < 1 || array.shape(0) > kMaxClasses || array.shape(1) != 3) {
        fail("palette", "expected shape (n, 3) with n from 1 to " + std::to_string(kMaxClasses) + ", got " +
                            shape_text(array));
    }
    PaletteTable table;
    table.size = static_cast<std::int32_t>(array.shape(0));
    for (py::ssize_t id = 0; id < array.shape(0); ++id) {
        for (py::ssize_t c = 0; c < 3; ++c) table.colours[id][c] = *static_cast<const std::uint8_t*>(array.data(id, c));
    }
    return table;
}

}  // namespace histoseg
