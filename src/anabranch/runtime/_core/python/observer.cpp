#include <cstdio>
#include <cstdlib>

#include "../sync.h"
#include "gil.h"

namespace anabranch::runtime {

namespace {

// An explorer written in Python: `make(kind, name)` gives a lock, an event or a place of its own.
class PythonObserver final : public Observer {
 public:
  explicit PythonObserver(py::object observer) : observer_(std::move(observer)) {}

  void* make(Kind kind, const char* name) override {
    Gil gil;
    return observer_.attr("make")(static_cast<int>(kind), name).release().ptr();
  }
  void forget(void* handle) override {
    if (!python_is_up()) return;
    Gil gil;
    Py_DECREF(static_cast<PyObject*>(handle));
  }
  void acquire(void* lock) override { call(lock, "acquire"); }
  void wait(void* event) override { call(event, "wait"); }
  void release(void* lock) noexcept override { call_or_end(lock, "release"); }
  void set(void* event) noexcept override { call_or_end(event, "set"); }
  void touch(void* place, const char* what, Mode mode) override {
    if (!python_is_up()) return;
    Gil gil;
    // An exception may be on its way while destructors come by here.
    py::error_scope scope;
    py::handle(static_cast<PyObject*>(place)).attr("touch")(what, static_cast<int>(mode));
  }

 private:
  static void call(void* object, const char* method) {
    if (!python_is_up()) return;
    Gil gil;
    py::error_scope scope;
    py::handle(static_cast<PyObject*>(object)).attr(method)();
  }
  // The explorer is the conductor: if it fails there is nobody left who could decide what runs next.
  static void call_or_end(void* object, const char* method) noexcept {
    try {
      call(object, method);
    } catch (std::exception& e) {
      std::fprintf(stderr, "anabranch: the explorer failed: %s\n", e.what());
      std::fflush(nullptr);
      std::_Exit(70);
    }
  }
  py::object observer_;
};

}  // namespace

void bind_observer(py::module_& m) {
  m.def("observe", [](const py::object& observer) {
    // Never destroyed: what was made for it may still be in use.
    install(observer.is_none() ? nullptr : new PythonObserver(observer));
  });
}

}  // namespace anabranch::runtime
