// The runtime as Python sees it: private to the package. What is called often is plain CPython, the rest pybind11.
//
// The GIL is let go of for the whole of a call. It is the outermost lock: nothing here holds one of the runtime's own
// locks while it asks for the GIL, but where an explorer watches (its locks are Python objects).
#include <Python.h>
#include <torch/csrc/Event.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cstdio>
#include <cstdlib>

#include "allocations.h"
#include "specialization.h"

namespace py = pybind11;

// Declared here as in <torch/csrc/jit/python/pybind_utils.h>, which brings TorchScript along: seconds of compiling.
namespace torch::jit {
TORCH_PYTHON_API c10::IValue toIValue(py::handle obj, const c10::TypePtr& type, std::optional<int32_t> N);
}  // namespace torch::jit

namespace anabranch::runtime {

namespace {

bool python_is_up() {
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
std::shared_ptr<PyObject> keep(py::handle object) {
  return {object.inc_ref().ptr(), [](PyObject* o) {
            if (!python_is_up()) return;
            Gil gil;
            Py_DECREF(o);
          }};
}

// -- the explorer ----------------------------------------------------------------------------------------------------

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

void set_observer(const py::object& observer) {
  // Never destroyed: what was made for it may still be in use.
  install(observer.is_none() ? nullptr : new PythonObserver(observer));
}

// -- errors ----------------------------------------------------------------------------------------------------------

// Makes the exception for a failed device call: (call, code) -> exception.
PyObject* make_device_error = nullptr;

PyObject* rethrow(const std::exception_ptr& error) {
  HANDLE_TH_ERRORS
  std::rethrow_exception(error);
  END_HANDLE_TH_ERRORS
}

// Sets Python's error from what was thrown.
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

// -- values ---------------------------------------------------------------------------------------------------------

// What a program returns: a tensor, or a number that it read or computed.
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

py::handle checked(PyObject* object) {
  if (!object) throw py::error_already_set();
  return object;
}

// A Python number as it is; none for what is no number of 64 bits.
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

// What kernels in Python return.
c10::IValue unwrap(py::handle value) {
  if (THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr());
  if (auto number = number_of(value)) return *number;
  TORCH_CHECK_TYPE(value.is_none(), "a kernel's result is neither a tensor nor a number");
  return {};
}

// -- one signature ---------------------------------------------------------------------------------------------------

// Threads that are inside a call. Guarded by the GIL.
int64_t calls_under_way = 0;
// Whether this thread is: it must not wait for the device. Not while it builds.
thread_local bool t_inside = false;
// The slot that this thread has added to a pool, until it gives it back or has its call on it.
thread_local Slot* t_added = nullptr;

// Room in the limits for one more context. Given back when this goes, unless its context has: an exception may leave
// the build anywhere.
class Reservation {
 public:
  Reservation(std::shared_ptr<PyObject> limits, int64_t bytes)
      : kept_(std::move(limits)), limits_(py::handle(kept_.get()).cast<Limits*>()), bytes_(bytes) {}
  ~Reservation() { cancel(); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  int64_t bytes() const { return bytes_; }
  bool confirm(int64_t actual) {
    bool fits = limits_->confirm(bytes_, actual);
    bytes_ = actual;
    return fits;
  }
  void cancel() {
    if (std::exchange(is_held_, false)) limits_->forget(bytes_);
  }

 private:
  std::shared_ptr<PyObject> kept_;
  Limits* limits_;
  int64_t bytes_;
  bool is_held_ = true;
};

// What Python has of a specialization.
struct Signature {
  std::unique_ptr<Specialization> spec;
  std::shared_ptr<PyObject> limits, counters;  // kept
  std::shared_ptr<PyObject> owner;             // a weak reference to the Python object, which builds contexts
  std::shared_ptr<PyObject> unchanged;         // () -> bool: see Specialization::flags_unchanged

  Specialization::Built build(int64_t reserved) {
    struct Outside {
      Outside() { t_inside = false; }
      ~Outside() { t_inside = true; }
    } outside;
    Gil gil;
    auto self = py::reinterpret_borrow<py::object>(owner.get())();
    py::object built = py::none();
    auto reservation = std::make_unique<Reservation>(limits, reserved);
    try {
      if (!self.is_none()) built = self.attr("_build_native")(std::move(reservation));
    } catch (...) {
      discard_added();
      throw;
    }
    t_added = nullptr;
    if (built.is_none()) return {};
    auto slot = built.cast<uintptr_t>();
    return {reinterpret_cast<Slot*>(slot), slot == 0};
  }

  // An interrupt came between the context's being added and its having an owner who knows of it.
  void discard_added() {
    if (auto* slot = std::exchange(t_added, nullptr)) (void)spec->pool.discard(slot).reset();
  }

  // `is_unchanged`: () -> bool, see Specialization::flags_unchanged, or None. `only_numerics`: it looks at nothing
  // else.
  void watch_flags(const py::object& is_unchanged, bool only_numerics) {
    if (is_unchanged.is_none()) return;
    unchanged = keep(is_unchanged);
    // Of the flags as they were at compile, which is known of them if nobody changes them meanwhile.
    auto before = flags_now();
    bool known = only_numerics && is_unchanged().cast<bool>() && flags_now() == before;
    spec->flags = known ? before : std::nullopt;
    spec->flags_unchanged = [kept = unchanged] {
      Gil gil;
      return py::reinterpret_borrow<py::object>(kept.get())().cast<bool>();
    };
  }

  // Called with the GIL, which is let go of meanwhile, unless the kernels need it. False: this call has to take another
  // way. Throws.
  bool run(const at::Tensor* inputs, const Values& numbers, Values& results) {
    std::exception_ptr error;
    auto outcome = Specialization::Outcome::kDeclined;
    ++calls_under_way;
    t_inside = true;
    PyThreadState* state = spec->needs_gil() ? nullptr : PyEval_SaveThread();
    try {
      outcome = spec->run(inputs, numbers, [this](int64_t reserved) { return build(reserved); }, results);
    } catch (...) {
      error = std::current_exception();
    }
    if (state) PyEval_RestoreThread(state);
    t_inside = false;
    --calls_under_way;
    if (error) {
      results.clear();
      set_error(error);
      throw py::error_already_set();
    }
    return outcome == Specialization::Outcome::kDone;
  }
};

c10::Event* event_of(py::handle event) {
  TORCH_CHECK_TYPE(THPEvent_Check(event.ptr()), "expected a torch.Event");
  return &reinterpret_cast<THPEvent*>(event.ptr())->event;
}

// (node, (function, kernel, context), grid, block, shared bytes, params, offsets, packed, [(at, buffer, delta)])
using KernelTuple =
    std::tuple<uintptr_t, std::array<uintptr_t, 3>, std::array<unsigned, 3>, std::array<unsigned, 3>, unsigned,
               py::bytes, std::vector<size_t>, bool, std::vector<std::tuple<size_t, int, int64_t>>>;

std::vector<Kernel> kernels_of(const std::vector<KernelTuple>& given) {
  std::vector<Kernel> all;
  for (auto& [node, handles, grid, block, shared_bytes, params, offsets, packed, patches] : given) {
    Kernel kernel;
    kernel.node = reinterpret_cast<void*>(node);
    kernel.function = reinterpret_cast<void*>(handles[0]);
    kernel.kernel = reinterpret_cast<void*>(handles[1]);
    kernel.context = reinterpret_cast<void*>(handles[2]);
    kernel.grid = grid;
    kernel.block = block;
    kernel.shared_bytes = shared_bytes;
    std::string_view view = params;
    kernel.params.assign(view.begin(), view.end());
    kernel.offsets = offsets;
    kernel.packed = packed;
    for (auto& [at, buffer, delta] : patches) kernel.patches.push_back({at, buffer, delta});
    all.push_back(std::move(kernel));
  }
  return all;
}

// A context that its builder has in hand; returns its slot.
uintptr_t add_context(Signature& self, py::handle owner, py::handle done, uintptr_t graph,
                      const std::vector<std::optional<at::Tensor>>& inputs, const std::vector<at::Tensor>& results,
                      const std::vector<bool>& bound, const std::vector<KernelTuple>& kernels, int64_t bytes) {
  auto context = std::make_unique<Context>();
  context->owner = keep(owner);
  context->done = event_of(done);
  context->graph = reinterpret_cast<void*>(graph);
  for (auto& x : inputs) context->inputs.push_back(x.value_or(at::Tensor()));
  if (!self.spec->layout) self.spec->layout.emplace(results, bound);
  context->results = self.spec->layout->sources(results);
  for (size_t i = 0; i < bound.size(); ++i) {
    if (bound[i]) context->results[i] = nullptr;
  }
  context->kernels = kernels_of(kernels);
  t_added = self.spec->pool.add(std::move(context), bytes);
  return reinterpret_cast<uintptr_t>(t_added);
}

Slot* slot_of(uintptr_t slot) {
  return reinterpret_cast<Slot*>(slot);
}

// -- the engine ------------------------------------------------------------------------------------------------------

// What a call finds out by itself: engines' base class. Its `tp_call` runs a call whose arguments are plain tensors of
// a signature that was compiled before; whatever is out of the ordinary goes to the method `_call`.
struct EngineBase {
  PyObject_HEAD struct Entry {
    PyObject* owner;  // the Python specialization: kept through a call, so that its weights are
    Signature* signature;
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
    auto& spec = *candidate.signature->spec;
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
      is_done = entry.signature->run(inputs.data(), {}, results);
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

// -- the direct path -------------------------------------------------------------------------------------------------

// An argument from Python: ("slot", i), ("number", i), ("list", [...]) or ("constant", value). `type`: what takes it.
Program::Argument argument_of(const c10::Argument& declared, c10::TypePtr type, const py::tuple& given) {
  Program::Argument argument;
  auto kind = given[0].cast<std::string>();
  if (auto optional = type->cast<c10::OptionalType>(); optional && kind != "constant")
    type = optional->getElementType();
  if (kind == "slot" || kind == "number") {
    bool is_number = kind == "number";
    argument.kind = is_number ? Program::Argument::kNumber : Program::Argument::kSlot;
    argument.slot = given[1].cast<int>();
    argument.wanted = type->kind();
    using Type = c10::TypeKind;
    auto wanted = type->kind();
    bool fits = wanted == Type::TensorType || (is_number && (wanted == Type::IntType || wanted == Type::FloatType ||
                                                             wanted == Type::BoolType || wanted == Type::NumberType));
    TORCH_CHECK_TYPE(fits, "argument ", declared.name(), " is a ", type->str(), ", given a ",
                     is_number ? "number" : "tensor", " that is computed");
  } else if (kind == "list") {
    argument.kind = Program::Argument::kList;
    TORCH_CHECK_TYPE(type->kind() == c10::TypeKind::ListType, "argument ", declared.name(), " is no list");
    argument.element = type->expectRef<c10::ListType>().getElementType();
    for (auto item : given[1].cast<py::list>())
      argument.items.push_back(argument_of(declared, argument.element, item.cast<py::tuple>()));
  } else {
    auto plain = type;
    if (auto optional = type->cast<c10::OptionalType>()) plain = optional->getElementType();
    auto number = plain->kind() == c10::TypeKind::TensorType ? number_of(given[1]) : std::nullopt;
    // A number beside a tensor, as in `x * 2`.
    argument.constant =
        number ? converted(*number, c10::TypeKind::TensorType) : torch::jit::toIValue(given[1], type, declared.N());
  }
  return argument;
}

// An argument of what is no operator: a value as it is.
Program::Argument any_argument(const py::tuple& given) {
  Program::Argument argument;
  auto kind = given[0].cast<std::string>();
  if (kind == "slot" || kind == "number") {
    argument.kind = kind == "slot" ? Program::Argument::kSlot : Program::Argument::kNumber;
    argument.slot = given[1].cast<int>();
    return argument;
  }
  auto number = number_of(given[1]);
  TORCH_CHECK_TYPE(number, "expected a value from a slot, or a number");
  argument.constant = *number;
  return argument;
}

std::vector<Program::Argument> any_arguments(const py::list& given) {
  std::vector<Program::Argument> all;
  for (auto item : given) all.push_back(any_argument(item.cast<py::tuple>()));
  return all;
}

int append_call(Program& program, const std::string& name, const std::string& overload, const py::list& given) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::vector<Program::Argument> arguments;
  auto& declared = op.schema().arguments();
  for (size_t i = 0; i < given.size(); ++i)
    arguments.push_back(argument_of(declared.at(i), declared.at(i).type(), given[i].cast<py::tuple>()));
  return program.call(name, overload, std::move(arguments));
}

}  // namespace
}  // namespace anabranch::runtime

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace anabranch::runtime;

  // -- the process
  m.def("observe", &set_observer);
  m.def("on_device_error", [](py::object make) { make_device_error = make.release().ptr(); });
  m.def("calls_under_way", [] { return calls_under_way; });
  m.def("in_call", [] { return t_inside; });
  m.def("exit", [] { is_exiting = true; });
  m.def("cuda_api", [] { return reinterpret_cast<uintptr_t>(&cuda_api()); });

  // -- bookkeeping
  py::class_<Reservation>(m, "Reservation")
      .def_property_readonly("nbytes", &Reservation::bytes)
      .def("confirm", &Reservation::confirm)
      .def("cancel", &Reservation::cancel);
  py::class_<Limits>(m, "Limits")
      .def(py::init([](int64_t contexts, std::optional<int64_t> memory) {
        return std::make_unique<Limits>(contexts, memory.value_or(-1));
      }))
      .def("book",
           [](py::object self, int64_t bytes) -> std::unique_ptr<Reservation> {
             if (!self.cast<Limits*>()->reserve(bytes)) return nullptr;
             return std::make_unique<Reservation>(keep(self), bytes);
           })
      .def("held", &Limits::held)
      .def_readonly("max_contexts", &Limits::max_contexts)
      .def_property_readonly("memory_limit", [](const Limits& self) -> std::optional<int64_t> {
        if (self.memory_limit < 0) return std::nullopt;
        return self.memory_limit;
      });
  py::class_<Counters>(m, "Counters")
      .def(py::init<>())
      .def(
          "add",
          [](Counters& self, const std::string& name, int64_t count) {
            for (int i = 0; i < Counters::kNames; ++i) {
              auto known = static_cast<Counters::Name>(i);
              if (name == Counters::names[static_cast<size_t>(i)]) return self.add(known, count);
            }
            throw py::key_error(name);
          },
          py::arg("name"), py::arg("count") = 1)
      .def("read", [](const Counters& self) {
        py::dict all;
        for (int i = 0; i < Counters::kNames; ++i) {
          all[Counters::names[static_cast<size_t>(i)]] = self.read(static_cast<Counters::Name>(i));
        }
        return all;
      });

  // -- the direct path
  m.def("flags", &flags_now);
  // For tests: None where it is left to Python.
  m.def("compute", [](const std::string& name, const py::list& given) -> py::object {
    std::vector<c10::IValue> values;
    for (auto x : given) values.push_back(unwrap(x));
    try {
      return py::reinterpret_steal<py::object>(checked(wrap(compute(number_op(name), values.data(), values.size()))));
    } catch (Declined&) {
      return py::none();
    }
  });
  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<std::vector<at::Tensor>, int>())
      .def("call", &append_call)
      .def("pick", &Program::pick)
      .def("number", [](Program& self, const std::string& name,
                        const py::list& given) { return self.number(name, any_arguments(given)); })
      .def("check", [](Program& self, const py::tuple& holds,
                       const std::string& message) { return self.check(any_argument(holds), message); })
      .def("branch",
           [](Program& self, const py::tuple& condition, std::shared_ptr<Program> yes, std::shared_ptr<Program> no,
              const py::list& operands, size_t results) {
             return self.branch(any_argument(condition), std::move(yes), std::move(no), any_arguments(operands),
                                results);
           })
      .def("finish", &Program::finish)
      .def("__len__", &Program::size);

  // -- one signature
  py::class_<Signature>(m, "Signature")
      .def(py::init([](const c10::Device& device, uintptr_t api, const std::vector<at::Tensor>& specs,
                       py::object limits, py::object counters, py::object owner) {
        auto self = std::make_unique<Signature>();
        std::vector<InputSpec> inputs;
        for (auto& x : specs) inputs.emplace_back(x);
        self->limits = keep(limits);
        self->counters = keep(counters);
        self->owner = keep(owner);
        self->spec =
            std::make_unique<Specialization>(device, reinterpret_cast<const DeviceApi*>(api), std::move(inputs),
                                             limits.cast<Limits*>(), counters.cast<Counters*>());
        return self;
      }))
      .def("run",
           [](Signature& self, const py::list& given) -> py::object {
             std::vector<at::Tensor> inputs;
             Values numbers, results;
             for (auto x : given) {
               if (inputs.size() < self.spec->specs.size()) {
                 inputs.push_back(x.cast<at::Tensor>());
               } else if (auto number = number_of(x)) {
                 numbers.push_back(*number);
               } else {
                 return py::none();  // past 64 bits
               }
             }
             if (!self.run(inputs.data(), numbers, results)) return py::none();
             py::list all;
             for (auto& y : results) all.append(py::reinterpret_steal<py::object>(checked(wrap(std::move(y)))));
             return all;
           })
      .def("add", &add_context)
      .def(
          "release",
          [](Signature& self, uintptr_t slot, std::optional<int64_t> stream) {
            t_added = nullptr;
            self.spec->pool.release(slot_of(slot), stream.value_or(Slot::kNever));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("discard",
           [](Signature& self, uintptr_t slot) {
             t_added = nullptr;
             (void)self.spec->pool.discard(slot_of(slot)).reset();
           })
      .def("discard_added", &Signature::discard_added)
      .def("drain", [](Signature& self) { (void)self.spec->pool.drain().size(); })
      .def("estimate", [](Signature& self) { return self.spec->pool.estimate(); })
      .def("alive", [](Signature& self) { return self.spec->pool.alive(); })
      .def("take",
           [](Signature& self, uintptr_t slot) {
             if (!self.spec->pool.take(slot_of(slot))) throw std::runtime_error("the slot is in other hands");
           })
      .def("forget_uses", [](Signature& self) { self.spec->pool.forget_uses(); })
      .def("after_fork",
           [](Signature& self) {
             self.spec->pool.after_fork();
             self.spec->events.after_fork();
           })
      .def("may_grow", [](Signature& self) { return self.spec->may_grow.load("read"); })
      .def("set_may_grow", [](Signature& self, bool value) { self.spec->may_grow.store("write", value); })
      .def("set_graphs", [](Signature& self, bool value) { self.spec->uses_graphs = value; })
      .def("set_program",
           [](Signature& self, std::shared_ptr<Program> program, py::object unchanged, bool only_numerics) {
             self.spec->program = std::move(program);
             self.watch_flags(unchanged, only_numerics);
           })
      .def("set_python",
           [](Signature& self, py::object kernels, py::object unchanged, bool only_numerics) {
             self.spec->python = [kept = keep(kernels)](const std::vector<at::Tensor>& inputs, Values& results) {
               Gil gil;
               auto made = py::reinterpret_borrow<py::object>(kept.get())(inputs);
               for (auto y : py::reinterpret_borrow<py::iterable>(made)) results.push_back(unwrap(y));
             };
             self.watch_flags(unchanged, only_numerics);
           })
      .def("sees_flags", [](Signature& self) { return self.spec->flags.has_value(); })
      .def("set_kernels",
           [](Signature& self, const std::vector<at::Tensor>& results, const std::vector<KernelTuple>& kernels) {
             self.spec->kernels = kernels_of(kernels);
             if (!self.spec->layout) self.spec->layout.emplace(results, std::vector<bool>(results.size(), true));
           })
      .def("set_alignment", [](Signature& self, size_t bytes) { self.spec->alignment = bytes; })
      .def("set_last_uses", [](Signature& self, py::object make) {
        self.spec->has_weights = true;
        self.spec->new_event = [made = keep(make)](c10::StreamId stream) -> std::unique_ptr<Payload> {
          Gil gil;
          auto event = py::reinterpret_borrow<py::object>(made.get())(stream);
          auto context = std::make_unique<Context>();
          context->done = event_of(event);
          context->owner = keep(event);
          return context;
        };
      });

  bind_allocations(m);

  // -- the engine
  auto engine = py::reinterpret_steal<py::object>(make_engine_type());
  if (!engine) throw py::error_already_set();
  m.attr("EngineBase") = engine;
  m.def("register", [](py::handle self, py::handle owner, Signature& signature, const std::string& finish) {
    engine_of(self)->entries->push_back({owner.inc_ref().ptr(), &signature, finish.at(0)});
  });
  m.def("clear", [](py::handle self) { engine_clear(self.ptr()); });
  m.def("set_usable", [](py::handle self, bool usable) { engine_of(self)->is_usable = usable; });
}
