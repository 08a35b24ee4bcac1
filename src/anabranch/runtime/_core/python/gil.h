// The GIL is let go of for the whole of a call. It is the outermost lock: nothing here holds one of the runtime's own
// locks while it asks for the GIL, but where an explorer watches (its locks are Python objects).
#pragma once

#include <Python.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

namespace anabranch::runtime {

namespace py = pybind11;

inline bool python_is_up() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// A Python object that is let go of with the GIL, wherever that happens; at the interpreter's end not at all.
inline std::shared_ptr<PyObject> keep(py::handle object) {
  return {object.inc_ref().ptr(), [](PyObject* o) {
            if (!python_is_up()) return;
            Gil gil;
            Py_DECREF(o);
          }};
}

}  // namespace anabranch::runtime
