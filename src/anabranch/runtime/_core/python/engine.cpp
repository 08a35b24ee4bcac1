#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "errors.h"
#include "specialization.h"
#include "values.h"

namespace anabranch::runtime {

namespace {

// What a call finds out by itself: engines' base class. Its `tp_call` runs a call whose arguments are plain tensors of
// a signature that was compiled before; whatever is out of the ordinary goes to the method `_call`.
struct EngineBase {
  PyObject_HEAD struct Entry {
    PyObject* owner;  // Python's NativeCalls: kept through a call, so that the weights are
    PySpecialization* calls;
    char finish;  // '1': a tensor; 't': a tuple of all results; 'l': a list; 'p': by the method `_finish`
  };
  std::vector<Entry>* entries;
  // Not closed, not of another process, the device not lost.
  bool is_usable;
};

int engine_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  auto* entries = reinterpret_cast<EngineBase*>(self)->entries;
  if (entries) {
    for (auto& entry : *entries) Py_VISIT(entry.owner);
  }
  return 0;
}

int engine_clear(PyObject* self) {
  auto* entries = reinterpret_cast<EngineBase*>(self)->entries;
  if (!entries) return 0;
  std::vector<EngineBase::Entry> gone;
  gone.swap(*entries);  // what dies here may come by again
  for (auto& entry : gone) Py_DECREF(entry.owner);
  return 0;
}

PyObject* engine_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* self = reinterpret_cast<EngineBase*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->entries = new std::vector<EngineBase::Entry>;
  self->is_usable = true;
  return reinterpret_cast<PyObject*>(self);
}

void engine_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  engine_clear(self);
  delete reinterpret_cast<EngineBase*>(self)->entries;
  auto* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

bool is_exiting = false;

PyObject* finish(const EngineBase::Entry& entry, PyObject* args, Values& results) {
  if (entry.finish == '1') return wrap(std::move(results[0]));
  auto count = static_cast<Py_ssize_t>(results.size());
  bool is_list = entry.finish != 't';
  PyObject* all = is_list ? PyList_New(count) : PyTuple_New(count);
  if (!all) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* result = wrap(std::move(results[static_cast<size_t>(i)]));
    if (!result) {
      Py_DECREF(all);
      return nullptr;
    }
    if (is_list)
      PyList_SET_ITEM(all, i, result);
    else
      PyTuple_SET_ITEM(all, i, result);
  }
  if (entry.finish != 'p') return all;
  static PyObject* name = PyUnicode_InternFromString("_finish");
  PyObject* finished = nullptr;
  if (PyObject* method = PyObject_GetAttr(entry.owner, name)) {
    finished = PyObject_CallFunctionObjArgs(method, args, all, nullptr);
    Py_DECREF(method);
  }
  Py_DECREF(all);
  return finished;
}

// With an error set: the method `_failed` may put another one in its place.
void report(PyObject* self) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback) PyException_SetTraceback(value, traceback);
  PyObject* result = PyObject_CallMethod(self, "_failed", "O", value);
  if (!result) {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return;
  }
  Py_DECREF(result);
  PyErr_Restore(type, value, traceback);
}

PyObject* engine_call_or_throw(PyObject* object, PyObject* args, PyObject* kwargs) {
  auto* self = reinterpret_cast<EngineBase*>(object);
  auto declined = [&]() -> PyObject* {
    static PyObject* name = PyUnicode_InternFromString("_call");
    PyObject* method = PyObject_GetAttr(object, name);
    if (!method) return nullptr;
    PyObject* result = PyObject_Call(method, args, kwargs);
    Py_DECREF(method);
    return result;
  };
  auto count = static_cast<size_t>(PyTuple_GET_SIZE(args));
  if ((kwargs && PyDict_GET_SIZE(kwargs)) || !self->is_usable || is_exiting) return declined();
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return declined();
  c10::SmallVector<const at::Tensor*, 4> given;
  bool grad = at::GradMode::is_enabled();
  for (size_t i = 0; i < count; ++i) {
    PyObject* x = PyTuple_GET_ITEM(args, static_cast<Py_ssize_t>(i));
    if (!THPVariable_CheckExact(x)) return declined();
    given.push_back(&THPVariable_Unpack(x));
    if (grad && given.back()->requires_grad()) return declined();
  }
  for (auto& candidate : *self->entries) {
    auto& spec = *candidate.calls->spec;
    if (!spec.accepts(given.data(), count)) continue;
    if (spec.is_lost()) break;
    // The list may change while the GIL is not held.
    auto entry = candidate;
    Py_INCREF(entry.owner);
    // Tensors of our own: another thread may put others in the place of the caller's.
    c10::SmallVector<at::Tensor, 4> inputs;
    for (auto* x : given) inputs.push_back(*x);
    Values results;
    PyObject* answer = nullptr;
    bool is_done = false;
    try {
      is_done = entry.calls->run(inputs.data(), {}, results);
      if (is_done) answer = finish(entry, args, results);
    } catch (py::error_already_set& e) {
      is_done = true;
      e.restore();
      report(object);
    } catch (...) {
      is_done = true;
      set_error(std::current_exception());
    }
    Py_DECREF(entry.owner);
    return is_done ? answer : declined();
  }
  return declined();
}

// Python calls this: nothing may be thrown through it, whatever a caller passes.
PyObject* engine_call(PyObject* object, PyObject* args, PyObject* kwargs) {
  try {
    return engine_call_or_throw(object, args, kwargs);
  } catch (...) {
    set_error(std::current_exception());
    return nullptr;
  }
}

EngineBase* engine_of(py::handle object) {
  return reinterpret_cast<EngineBase*>(object.ptr());
}

PyObject* make_engine_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(engine_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(engine_dealloc)},
                                {Py_tp_traverse, reinterpret_cast<void*>(engine_traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(engine_clear)},
                                {Py_tp_call, reinterpret_cast<void*>(engine_call)},
                                {0, nullptr}};
  static PyType_Spec spec{"anabranch.runtime.EngineBase", sizeof(EngineBase), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("exit", [] { is_exiting = true; });
  auto engine = py::reinterpret_steal<py::object>(make_engine_type());
  if (!engine) throw py::error_already_set();
  m.attr("EngineBase") = engine;
  m.def("register", [](py::handle self, py::handle owner, PySpecialization& calls, const std::string& finish) {
    engine_of(self)->entries->push_back({owner.inc_ref().ptr(), &calls, finish.at(0)});
  });
  m.def("unregister", [](py::handle self, PySpecialization& calls) {
    auto& entries = *engine_of(self)->entries;
    std::vector<EngineBase::Entry> gone;
    for (auto& entry : entries) {
      if (entry.calls == &calls) gone.push_back(entry);
    }
    std::erase_if(entries, [&](auto& entry) { return entry.calls == &calls; });
    for (auto& entry : gone) Py_DECREF(entry.owner);  // what dies here may come by again
  });
  m.def("clear", [](py::handle self) { engine_clear(self.ptr()); });
  m.def("set_usable", [](py::handle self, bool usable) { engine_of(self)->is_usable = usable; });
}

}  // namespace anabranch::runtime
