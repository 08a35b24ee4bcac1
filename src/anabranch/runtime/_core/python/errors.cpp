#include "errors.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "../device.h"

namespace anabranch::runtime {

namespace py = pybind11;

namespace {

// Makes the exception for a failed device call: (call, code) -> exception.
PyObject* make_device_error = nullptr;

PyObject* rethrow(const std::exception_ptr& error) {
  HANDLE_TH_ERRORS
  std::rethrow_exception(error);
  END_HANDLE_TH_ERRORS
}

}  // namespace

void set_error(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (DeviceError& e) {
    PyObject* made = make_device_error ? PyObject_CallFunction(make_device_error, "si", e.call, e.code) : nullptr;
    if (made) {
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made)), made);
      Py_DECREF(made);
    } else if (!PyErr_Occurred()) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  } catch (...) {
    rethrow(error);
  }
}

void bind_errors(py::module_& m) {
  m.def("on_device_error", [](py::object make) { make_device_error = make.release().ptr(); });
}

}  // namespace anabranch::runtime
