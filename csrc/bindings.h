// What the bindings files share; they alone know Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "labels_pixel.h"

namespace py = pybind11;

namespace histoseg {

// In bindings_cuda.cpp, bindings_layers.cpp, bindings_outlines.cpp and bindings_png.cpp.
void bind_cuda(py::module_& m);
void bind_layers(py::module_& m);
void bind_outlines(py::module_& m);
void bind_png(py::module_& m);

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

// NumPy leaves the stride of an axis of length 0 or 1 undefined.
inline void check_contiguous(const py::array& array, const char* name, py::ssize_t axis, py::ssize_t stride) {
    if (array.size() > 0 && array.shape(axis) > 1 && array.strides(axis) != stride) {
        fail(name, "axis " + std::to_string(axis) + " must be contiguous (stride " + std::to_string(stride) +
                       " bytes), got " + std::to_string(array.strides(axis)));
    }
}

inline void check_shape(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
    if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) == shape) return;
    fail(name, "expected shape " + py::str(py::tuple(py::cast(shape))).cast<std::string>() + ", got " +
                   shape_text(array));
}

// An output: the same checks, and it can be written to.
template <typename T>
py::array checked_output(const py::object& object, const char* name, const std::vector<py::ssize_t>& shape) {
    auto array = checked<T>(object, name, static_cast<py::ssize_t>(shape.size()));
    if (!array.writeable()) fail(name, "is read-only");
    check_shape(array, name, shape);
    check_contiguous(array, name, array.ndim() - 1, static_cast<py::ssize_t>(sizeof(T)));
    return array;
}

// Rows of packed RGB pixels, any distance apart.
inline void check_packed_rgb(const py::array& array, const char* name) {
    check_contiguous(array, name, 2, 1);
    check_contiguous(array, name, 1, 3);
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
