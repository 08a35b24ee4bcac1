#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "engine.h"
#include "errors.h"

namespace anabranch::runtime {

namespace {

// The base class of sessions. Its `tp_call` runs a call whose arguments are plain tensors of a signature that this
// session was called with before, by Python's method `_call`, which takes the others.
struct SessionBase {
  // A counter among the state: how far it may have got when a call comes, and what the call adds to it; neither where
  // that is not known.
  using Count = std::optional<int64_t>;
  struct Room {
    size_t slot;
    Count step, limit;
  };
  PyObject_HEAD struct Bound {
    PySpecialization* calls;
    PyObject* owner;  // keeps `calls`
    std::vector<at::Tensor> state;
    std::vector<Room> rooms;
  };
  PyObject* engine;  // an EngineBase
  PyObject* busy;    // a lock: one call at a time
  PyObject* memory;  // Python's, of the state: kept through a call, so that its memory goes to nobody else
  std::vector<Bound>* bound;
  std::vector<Count>* counts;
  SessionOrder order;
  // Not closed, and no call of it has failed.
  bool is_usable;
};

SessionBase* session_of(py::handle object) {
  return reinterpret_cast<SessionBase*>(object.ptr());
}

int session_traverse(PyObject* object, visitproc visit, void* arg) {
  auto* self = reinterpret_cast<SessionBase*>(object);
  Py_VISIT(Py_TYPE(object));
  Py_VISIT(self->engine);
  Py_VISIT(self->busy);
  Py_VISIT(self->memory);
  if (self->bound) {
    for (auto& bound : *self->bound) Py_VISIT(bound.owner);
  }
  return 0;
}

int session_clear(PyObject* object) {
  auto* self = reinterpret_cast<SessionBase*>(object);
  self->is_usable = false;
  std::vector<SessionBase::Bound> gone;
  if (self->bound) gone.swap(*self->bound);  // what dies here may come by again
  for (auto& bound : gone) Py_DECREF(bound.owner);
  Py_CLEAR(self->engine);
  Py_CLEAR(self->busy);
  Py_CLEAR(self->memory);
  return 0;
}

PyObject* session_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* self = reinterpret_cast<SessionBase*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->bound = new std::vector<SessionBase::Bound>;
  self->counts = new std::vector<SessionBase::Count>;
  self->order = {};
  return reinterpret_cast<PyObject*>(self);
}

void session_dealloc(PyObject* object) {
  PyObject_GC_UnTrack(object);
  session_clear(object);
  delete reinterpret_cast<SessionBase*>(object)->bound;
  delete reinterpret_cast<SessionBase*>(object)->counts;
  auto* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// Holds a session's lock while it lives, if it was free.
class Alone {
 public:
  explicit Alone(PyObject* lock) : lock_(lock) {
    static PyObject* name = PyUnicode_InternFromString("acquire");
    PyObject* taken = PyObject_CallMethodOneArg(lock, name, Py_False);
    if (!taken) throw py::error_already_set();
    is_taken_ = taken == Py_True;
    Py_DECREF(taken);
  }
  ~Alone() {
    if (!is_taken_) return;
    py::error_scope kept;  // a call may have failed
    static PyObject* name = PyUnicode_InternFromString("release");
    PyObject* done = PyObject_CallMethodNoArgs(lock_, name);
    if (done)
      Py_DECREF(done);
    else
      PyErr_WriteUnraisable(lock_);
  }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;
  bool is_taken() const { return is_taken_; }

 private:
  PyObject* lock_;
  bool is_taken_ = false;
};

// `is_done` false: Python has to make this call.
PyObject* run_alone(SessionBase* self, const EngineBase::Entry& entry, const PlainTensors& given, PyObject* args,
                    bool& is_done) {
  auto& all = *self->bound;
  auto bound = std::find_if(all.begin(), all.end(), [&](auto& b) { return b.calls == entry.calls; });
  if (bound == all.end()) return nullptr;
  auto& counts = *self->counts;
  auto rooms = bound->rooms;
  for (auto& room : rooms) {
    if (room.slot >= counts.size()) return nullptr;
    auto& count = counts[room.slot];
    if (count && room.limit && *count > *room.limit) return nullptr;  // full, as Python says with more words
  }
  // Tensors of our own: another thread may put others in the place of the caller's.
  c10::SmallVector<at::Tensor, 8> inputs;
  for (auto* x : given) inputs.push_back(*x);
  inputs.append(bound->state.begin(), bound->state.end());
  auto memory = py::reinterpret_borrow<py::object>(self->memory);
  Values results;
  try {
    is_done = entry.calls->run(inputs.data(), {}, results, &self->order);
    for (auto& room : rooms) {
      auto& count = counts[room.slot];
      if (is_done) count = count && room.step ? SessionBase::Count(*count + *room.step) : std::nullopt;
    }
    return is_done ? finish(entry, args, results) : nullptr;
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (...) {
    set_error(std::current_exception());
  }
  is_done = true;
  report(reinterpret_cast<PyObject*>(self));
  return nullptr;
}

PyObject* session_call_or_throw(PyObject* object, PyObject* args, PyObject* kwargs) {
  auto* self = reinterpret_cast<SessionBase*>(object);
  PlainTensors given;
  if (!self->is_usable || !engine_of(self->engine)->is_usable || !take_plain(args, kwargs, given)) {
    return call_in_python(object, args, kwargs);
  }
  for (auto& candidate : *engine_of(self->engine)->stateful) {
    if (!candidate.calls->spec->accepts(given.data(), given.size())) continue;
    // The list may change while the GIL is not held.
    auto entry = candidate;
    auto owner = py::reinterpret_borrow<py::object>(entry.owner);
    bool is_done = false;
    {
      Alone alone(self->busy);
      // Closed, or broken, by another thread, before this one had the lock.
      if (alone.is_taken() && self->is_usable) {
        if (auto* answer = run_alone(self, entry, given, args, is_done); is_done) return answer;
      }
    }
    break;
  }
  return call_in_python(object, args, kwargs);
}

// Python calls this: nothing may be thrown through it, whatever a caller passes.
PyObject* session_call(PyObject* object, PyObject* args, PyObject* kwargs) {
  try {
    return session_call_or_throw(object, args, kwargs);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (...) {
    set_error(std::current_exception());
  }
  return nullptr;
}

PyObject* make_session_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(session_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(session_dealloc)},
                                {Py_tp_traverse, reinterpret_cast<void*>(session_traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(session_clear)},
                                {Py_tp_call, reinterpret_cast<void*>(session_call)},
                                {0, nullptr}};
  static PyType_Spec spec{"anabranch.runtime.SessionBase", sizeof(SessionBase), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace

void bind_session(py::module_& m) {
  auto session = py::reinterpret_steal<py::object>(make_session_type());
  if (!session) throw py::error_already_set();
  m.attr("SessionBase") = session;
  m.def("begin_session", [](py::handle object, py::handle engine, py::handle busy, py::handle memory, py::handle done) {
    auto* self = session_of(object);
    self->order = {.done = done.is_none() ? nullptr : event_of(done)};
    self->engine = engine.inc_ref().ptr();
    self->busy = busy.inc_ref().ptr();
    self->memory = memory.inc_ref().ptr();
  });
  m.def("set_session_usable", [](py::handle self, bool usable) { session_of(self)->is_usable = usable; });
  // Python has queued work of the session, on whatever stream.
  m.def("forget_stream", [](py::handle self) { session_of(self)->order.stream = -1; });
  m.def("bind_session",
        [](py::handle self, py::handle owner, PySpecialization& calls, const std::vector<at::Tensor>& state,
           const std::vector<std::tuple<size_t, SessionBase::Count, SessionBase::Count>>& rooms) {
          auto& all = *session_of(self)->bound;
          if (std::any_of(all.begin(), all.end(), [&](auto& b) { return b.calls == &calls; })) return;
          std::vector<SessionBase::Room> own;
          for (auto& [slot, step, limit] : rooms) own.push_back({slot, step, limit});
          all.push_back({&calls, owner.inc_ref().ptr(), state, own});
        });
  m.def("session_counts", [](py::handle self) { return *session_of(self)->counts; });
  m.def("set_session_counts",
        [](py::handle self, const std::vector<SessionBase::Count>& counts) { *session_of(self)->counts = counts; });
  m.def("end_session", [](py::handle object) {
    auto* self = session_of(object);
    self->is_usable = false;
    std::vector<SessionBase::Bound> gone;
    gone.swap(*self->bound);  // what dies here may come by again
    for (auto& bound : gone) Py_DECREF(bound.owner);
    Py_CLEAR(self->memory);
  });
}

}  // namespace anabranch::runtime
