#include "engine.h"

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "errors.h"

namespace anabranch::runtime {

namespace {

bool is_exiting = false;

}  // namespace

EngineBase* engine_of(py::handle object) {
  return reinterpret_cast<EngineBase*>(object.ptr());
}

bool take_plain(PyObject* args, PyObject* kwargs, PlainTensors& given) {
  if ((kwargs && PyDict_GET_SIZE(kwargs)) || is_exiting) return false;
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  bool grad = at::GradMode::is_enabled();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* x = PyTuple_GET_ITEM(args, i);
    if (!THPVariable_CheckExact(x)) return false;
    given.push_back(&THPVariable_Unpack(x));
    if (grad && given.back()->requires_grad()) return false;
  }
  return true;
}

PyObject* call_in_python(PyObject* object, PyObject* args, PyObject* kwargs) {
  static PyObject* name = PyUnicode_InternFromString("_call");
  PyObject* method = PyObject_GetAttr(object, name);
  if (!method) return nullptr;
  PyObject* result = PyObject_Call(method, args, kwargs);
  Py_DECREF(method);
  return result;
}

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

namespace {

int engine_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  auto* engine = reinterpret_cast<EngineBase*>(self);
  for (auto* entries : {engine->entries, engine->stateful}) {
    if (!entries) continue;
    for (auto& entry : *entries) Py_VISIT(entry.owner);
  }
  return 0;
}

int engine_clear(PyObject* self) {
  auto* engine = reinterpret_cast<EngineBase*>(self);
  for (auto* entries : {engine->entries, engine->stateful}) {
    if (!entries) continue;
    std::vector<EngineBase::Entry> gone;
    gone.swap(*entries);  // what dies here may come by again
    for (auto& entry : gone) Py_DECREF(entry.owner);
  }
  return 0;
}

PyObject* engine_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* self = reinterpret_cast<EngineBase*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->entries = new std::vector<EngineBase::Entry>;
  self->stateful = new std::vector<EngineBase::Entry>;
  self->is_usable = true;
  return reinterpret_cast<PyObject*>(self);
}

void engine_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  engine_clear(self);
  delete reinterpret_cast<EngineBase*>(self)->entries;
  delete reinterpret_cast<EngineBase*>(self)->stateful;
  auto* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* engine_call_or_throw(PyObject* object, PyObject* args, PyObject* kwargs) {
  auto* self = reinterpret_cast<EngineBase*>(object);
  auto declined = [&] { return call_in_python(object, args, kwargs); };
  PlainTensors given;
  if (!self->is_usable || !take_plain(args, kwargs, given)) return declined();
  for (auto& candidate : *self->entries) {
    if (!candidate.calls->spec->accepts(given.data(), given.size())) continue;
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
    auto* engine = engine_of(self);
    auto* entries = calls.spec->owned ? engine->stateful : engine->entries;
    entries->push_back({owner.inc_ref().ptr(), &calls, finish.at(0)});
  });
  m.def("unregister", [](py::handle self, PySpecialization& calls) {
    std::vector<EngineBase::Entry> gone;
    for (auto* entries : {engine_of(self)->entries, engine_of(self)->stateful}) {
      for (auto& entry : *entries) {
        if (entry.calls == &calls) gone.push_back(entry);
      }
      std::erase_if(*entries, [&](auto& entry) { return entry.calls == &calls; });
    }
    for (auto& entry : gone) Py_DECREF(entry.owner);  // what dies here may come by again
  });
  m.def("clear", [](py::handle self) { engine_clear(self.ptr()); });
  m.def("set_usable", [](py::handle self, bool usable) { engine_of(self)->is_usable = usable; });
}

}  // namespace anabranch::runtime
