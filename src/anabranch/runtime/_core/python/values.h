// Tensors and numbers, on the way between Python and the runtime.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace anabranch::runtime {

namespace py = pybind11;

// What a program returns: a tensor, or a number that it read or computed. Null, with Python's error set: neither.
PyObject* wrap(c10::IValue&& value);
// The same, thrown.
py::object wrapped(c10::IValue&& value);

// What kernels in Python return.
c10::IValue unwrap(py::handle value);

// A Python number as it is; none for what is no number of 64 bits.
std::optional<c10::IValue> number_of(py::handle value);

}  // namespace anabranch::runtime
