#include "values.h"

#include <torch/csrc/autograd/python_variable.h>

namespace anabranch::runtime {

PyObject* wrap(c10::IValue&& value) {
  if (value.isTensor()) return THPVariable_Wrap(std::move(value).toTensor());
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  if (value.isDouble()) return PyFloat_FromDouble(value.toDouble());
  if (value.isComplexDouble()) {
    auto z = value.toComplexDouble();
    return PyComplex_FromDoubles(z.real(), z.imag());
  }
  if (value.isNone()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_TypeError, "a result is neither a tensor nor a number");
  return nullptr;
}

py::object wrapped(c10::IValue&& value) {
  PyObject* object = wrap(std::move(value));
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

std::optional<c10::IValue> number_of(py::handle value) {
  if (PyBool_Check(value.ptr())) return value.cast<bool>();
  if (PyLong_Check(value.ptr())) {
    int is_past = 0;
    auto number = PyLong_AsLongLongAndOverflow(value.ptr(), &is_past);
    if (is_past) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (PyFloat_Check(value.ptr())) return value.cast<double>();
  if (PyComplex_Check(value.ptr())) {
    auto z = PyComplex_AsCComplex(value.ptr());
    return c10::complex<double>(z.real, z.imag);
  }
  return std::nullopt;
}

c10::IValue unwrap(py::handle value) {
  if (THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr());
  if (auto number = number_of(value)) return *number;
  TORCH_CHECK_TYPE(value.is_none(), "a kernel's result is neither a tensor nor a number");
  return {};
}

}  // namespace anabranch::runtime
