#include "specialization.h"

#include <torch/csrc/Event.h>

#include "errors.h"
#include "reservation.h"
#include "values.h"

namespace anabranch::runtime {

namespace {

// Threads that are inside a call. Guarded by the GIL.
int64_t calls_under_way = 0;
// Whether this thread is: it must not wait for the device. Not while it builds.
thread_local bool t_inside = false;
// The slot that Python has added to a pool on this thread, until it gives it back.
thread_local Slot* t_added = nullptr;

// (node, (function, kernel, cu_context), grid, block, shared bytes, params, offsets, packed, [(at, buffer, delta)])
using KernelTuple =
    std::tuple<uintptr_t, std::array<uintptr_t, 3>, std::array<unsigned, 3>, std::array<unsigned, 3>, unsigned,
               py::bytes, std::vector<size_t>, bool, std::vector<std::tuple<size_t, int, int64_t>>>;

std::vector<Kernel> kernels_of(const std::vector<KernelTuple>& given) {
  std::vector<Kernel> all;
  for (auto& [node, handles, grid, block, shared_bytes, params, offsets, packed, patches] : given) {
    std::string_view bytes = params;
    Kernel kernel{.node = reinterpret_cast<void*>(node),
                  .function = reinterpret_cast<void*>(handles[0]),
                  .kernel = reinterpret_cast<void*>(handles[1]),
                  .cu_context = reinterpret_cast<void*>(handles[2]),
                  .grid = grid,
                  .block = block,
                  .shared_bytes = shared_bytes,
                  .params = {bytes.begin(), bytes.end()},
                  .offsets = offsets,
                  .packed = packed,
                  .patches = {}};
    for (auto& [at, buffer, delta] : patches) kernel.patches.push_back({at, buffer, delta});
    all.push_back(std::move(kernel));
  }
  return all;
}

// What there is of a context: (owner, done, graph, inputs, results, bound, kernels, bytes)
using ContextTuple = std::tuple<py::object, py::object, uintptr_t, std::vector<std::optional<at::Tensor>>,
                                std::vector<at::Tensor>, std::vector<bool>, std::vector<KernelTuple>, int64_t>;

// Puts a context into the pool, in its builder's hands.
Slot* add_context(PySpecialization& self, const ContextTuple& given) {
  auto& [owner, done, graph, inputs, results, bound, kernels, bytes] = given;
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
  return self.spec->pool.add(std::move(context), bytes);
}

}  // namespace

c10::Event* event_of(py::handle event) {
  TORCH_CHECK_TYPE(THPEvent_Check(event.ptr()), "expected a torch.Event");
  return &reinterpret_cast<THPEvent*>(event.ptr())->event;
}

Specialization::Built PySpecialization::build(int64_t reserved) {
  struct Outside {
    bool before = std::exchange(t_inside, false);
    ~Outside() { t_inside = before; }
  } outside;
  Gil gil;
  auto self = py::reinterpret_borrow<py::object>(owner.get())();
  if (self.is_none()) return {};
  py::object built = self.attr("build")(std::make_unique<Reservation>(limits, reserved));
  if (built.is_none()) return {};
  if (py::isinstance<py::bool_>(built)) return {nullptr, built.cast<bool>()};
  // Between Python's return and here no interrupt can come.
  return {add_context(*this, built.cast<ContextTuple>()), false};
}

void PySpecialization::discard_added() {
  if (auto* slot = std::exchange(t_added, nullptr)) (void)spec->pool.discard(slot).reset();
}

void PySpecialization::watch_flags(const py::object& is_unchanged, bool only_numerics) {
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

bool PySpecialization::run(const at::Tensor* inputs, const Values& numbers, Values& results, SessionOrder* session) {
  std::exception_ptr error;
  auto outcome = Specialization::Outcome::kDeclined;
  ++calls_under_way;
  bool nested = std::exchange(t_inside, true);
  PyThreadState* state = spec->needs_gil() ? nullptr : PyEval_SaveThread();
  try {
    // Not earlier: to ask may let go of the GIL, by which what was looked at before may have changed.
    if (!spec->is_lost())
      outcome = spec->run(inputs, numbers, [this](int64_t reserved) { return build(reserved); }, results, session);
  } catch (...) {
    error = std::current_exception();
  }
  if (state) PyEval_RestoreThread(state);
  t_inside = nested;
  --calls_under_way;
  if (error) {
    results.clear();
    set_error(error);
    throw py::error_already_set();
  }
  return outcome == Specialization::Outcome::kDone;
}

void bind_specialization(py::module_& m) {
  m.def("calls_under_way", [] { return calls_under_way; });
  m.def("in_call", [] { return t_inside; });
  // Of a pool, which lives as long as its specialization does.
  py::class_<Slot, std::unique_ptr<Slot, py::nodelete>>(m, "Slot");
  py::class_<PySpecialization>(m, "Specialization")
      .def(py::init([](const c10::Device& device, uintptr_t api, const std::vector<std::optional<at::Tensor>>& specs,
                       const std::vector<size_t>& written, const std::vector<size_t>& owned, py::object limits,
                       py::object counters, py::object owner) {
        auto self = std::make_unique<PySpecialization>();
        std::vector<InputSpec> inputs;
        for (auto& x : specs) inputs.push_back(x ? InputSpec(*x) : InputSpec());
        for (size_t i : written) inputs.at(i).written = true;
        for (size_t i : owned) inputs.at(i).owned = true;
        self->limits = keep(limits);
        self->counters = keep(counters);
        self->owner = keep(owner);
        self->spec =
            std::make_unique<Specialization>(device, reinterpret_cast<const DeviceApi*>(api), std::move(inputs),
                                             limits.cast<Limits*>(), counters.cast<Counters*>());
        return self;
      }))
      .def("run",
           [](PySpecialization& self, const py::list& given) -> py::object {
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
             for (auto& y : results) all.append(wrapped(std::move(y)));
             return all;
           })
      .def(
          "add", [](PySpecialization& self, const ContextTuple& given) { return t_added = add_context(self, given); },
          py::return_value_policy::reference)
      .def(
          "release",
          [](PySpecialization& self, Slot& slot, std::optional<int64_t> stream) {
            t_added = nullptr;
            self.spec->pool.release(&slot, stream.value_or(Slot::kNever));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("discard",
           [](PySpecialization& self, Slot& slot) {
             t_added = nullptr;
             (void)self.spec->pool.discard(&slot).reset();
           })
      .def("discard_added", &PySpecialization::discard_added)
      .def("drain", [](PySpecialization& self) { (void)self.spec->pool.drain().size(); })
      .def("estimate", [](PySpecialization& self) { return self.spec->pool.estimate(); })
      .def("alive", [](PySpecialization& self) { return self.spec->pool.alive(); })
      .def("take",
           [](PySpecialization& self, Slot& slot) {
             if (!self.spec->pool.take(&slot)) throw std::runtime_error("the slot is in other hands");
           })
      .def("forget_uses", [](PySpecialization& self) { self.spec->pool.forget_uses(); })
      .def("after_fork",
           [](PySpecialization& self) {
             self.spec->pool.after_fork();
             self.spec->events.after_fork();
           })
      .def("take_uses", [](PySpecialization& self) { return self.spec->uses.exchange(0); })
      .def("may_grow", [](PySpecialization& self) { return self.spec->may_grow.load("read"); })
      .def("set_may_grow", [](PySpecialization& self, bool value) { self.spec->may_grow.store("write", value); })
      .def("set_graphs", [](PySpecialization& self, bool value) { self.spec->uses_graphs = value; })
      .def("set_program",
           [](PySpecialization& self, std::shared_ptr<Program> program, py::object unchanged, bool only_numerics) {
             self.spec->program = std::move(program);
             self.watch_flags(unchanged, only_numerics);
           })
      .def("set_python",
           [](PySpecialization& self, py::object kernels, py::object unchanged, bool only_numerics) {
             self.spec->python = [kept = keep(kernels)](const std::vector<at::Tensor>& inputs, Values& results) {
               Gil gil;
               auto made = py::reinterpret_borrow<py::object>(kept.get())(inputs);
               for (auto y : py::reinterpret_borrow<py::iterable>(made)) results.push_back(unwrap(y));
             };
             self.watch_flags(unchanged, only_numerics);
           })
      .def("sees_flags", [](PySpecialization& self) { return self.spec->flags.has_value(); })
      .def("set_kernels",
           [](PySpecialization& self, const std::vector<at::Tensor>& results, const std::vector<KernelTuple>& kernels) {
             self.spec->kernels = kernels_of(kernels);
             if (!self.spec->layout) self.spec->layout.emplace(results, std::vector<bool>(results.size(), true));
           })
      .def("set_alignment", [](PySpecialization& self, size_t bytes) { self.spec->alignment = bytes; })
      .def("set_last_uses", [](PySpecialization& self, py::object make) {
        self.spec->has_weights = true;
        self.spec->new_event = [made = keep(make)](c10::StreamId stream) -> std::unique_ptr<Payload> {
          Gil gil;
          auto event = py::reinterpret_borrow<py::object>(made.get())(stream);
          auto last_use = std::make_unique<LastUse>();
          last_use->done = event_of(event);
          last_use->owner = keep(event);
          return last_use;
        };
      });
}

}  // namespace anabranch::runtime
