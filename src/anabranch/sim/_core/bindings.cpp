// The module that Python sees. What it offers is private to the package; anabranch.sim is the public face.
#include <ATen/ops/from_blob.h>
#include <pthread.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "native.h"
#include "threads.h"

namespace py = pybind11;

namespace anabranch::sim {

void seed_all(uint64_t seed);  // random.cpp

namespace {

// A tensor's bytes, from its first element to its last.
Range extent(const at::Tensor& t, bool write) {
  auto lo = reinterpret_cast<uintptr_t>(t.data_ptr());
  int64_t last = t.numel() ? 1 : 0;
  for (int64_t d = 0; last && d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return {lo, lo + static_cast<uintptr_t>(last * t.element_size()), write};
}

at::Tensor host_alias(const at::Tensor& t) {
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}

// Python objects that queued work needs, let go of with the GIL.
std::shared_ptr<py::function> keep(py::function fn) {
  return {new py::function(std::move(fn)), [](py::function* p) {
            py::gil_scoped_acquire gil;
            delete p;
          }};
}

void launch(const std::string& name, py::function fn, const std::vector<at::Tensor>& reads,
            const std::vector<at::Tensor>& writes) {
  Work work;
  work.name = name;
  std::vector<at::Tensor> aliases;
  int device = -1;
  for (size_t i = 0; i < reads.size() + writes.size(); ++i) {
    bool write = i >= reads.size();
    auto& t = write ? writes[i - reads.size()] : reads[i];
    TORCH_CHECK(t.device().type() == kSim, "sim: launch takes tensors on sim, not on ", t.device());
    TORCH_CHECK(device < 0 || device == t.device().index(), "sim: launch takes tensors of one device");
    device = t.device().index();
    work.ranges.push_back(extent(t, write));
    aliases.push_back(host_alias(t));
  }
  work.run = [kept = keep(std::move(fn)), aliases] {
    py::gil_scoped_acquire gil;
    py::list arguments;
    for (auto& alias : aliases) arguments.append(alias);
    try {
      (*kept)(*arguments);
    } catch (py::error_already_set& e) {
      throw std::runtime_error(e.what());
    }
  };
  py::gil_scoped_release release;
  enqueue(device, std::move(work));
}

// Number of elements of which every byte is the allocator's poison. The host looks; nothing is queued or waited for.
int64_t poisoned(const at::Tensor& t) {
  auto host = host_alias(t).contiguous();
  auto size = host.element_size();
  auto* bytes = static_cast<const unsigned char*>(host.data_ptr());
  // The pattern starts at even addresses; a block is aligned, but a slice of bytes need not be.
  auto offset = static_cast<size_t>(t.storage_offset() * size);
  bool dense = t.is_contiguous();
  int64_t count = 0;
  for (int64_t i = 0; i < host.numel(); ++i) {
    bool all = true;
    for (int64_t k = 0; all && k < size; ++k) {
      size_t at = static_cast<size_t>(i * size + k) + (dense ? offset : 0);
      auto expected = static_cast<unsigned char>(at % 2 ? kPoison >> 8 : kPoison & 0xFF);
      all = bytes[i * size + k] == expected;
    }
    count += all;
  }
  return count;
}

py::list heads() {
  auto& machine = Machine::get();
  Lock lock;
  // What a head is does not change while it waits: made once.
  static auto* known = new std::map<std::string, std::pair<std::string, PyObject*>>;
  py::list all;
  for (auto& queue : machine.queues()) {
    if (queue->ops.empty()) continue;
    auto& op = queue->ops.front();
    auto& entry = (*known)[queue->actor];
    if (entry.first != op.id || !entry.second) {
      py::list touches;
      for (auto& touch : machine.touches(*queue)) touches.append(py::reinterpret_steal<py::object>(touch_tuple(touch)));
      Py_XDECREF(entry.second);
      entry = {op.id, py::make_tuple(op.name, touches).release().ptr()};
    }
    py::tuple cached = py::reinterpret_borrow<py::tuple>(entry.second);
    all.append(py::make_tuple(queue->actor, machine.runnable(*queue), cached[0], cached[1]));
  }
  return all;
}

QueuePtr by_actor(const std::string& actor) {
  for (auto& queue : Machine::get().queues()) {
    if (queue->actor == actor) return queue;
  }
  TORCH_CHECK_VALUE(false, "sim: there is no stream ", actor);
}

QueuePtr find(int64_t stream, int device) {
  Lock lock;
  return Machine::get().queue(device, stream);
}

Lock* fork_lock = nullptr;

void trace(bool on) {
  auto& machine = Machine::get();
  Lock lock;
  machine.tracing = on;
  machine.trace.clear();
  machine.capture_traces.clear();
  if (!on) return;
  for (auto& queue : machine.queues()) {
    if (queue->kind == Queue::kLane || queue->trace_name() == "legacy") continue;
    machine.emit(R"({"do":"stream","stream":")" + queue->actor + R"(","kind":")" +
                 (queue->kind == Queue::kBlocking ? "blocking" : "nonblocking") + R"(","device":)" +
                 std::to_string(queue->device) + "}");
  }
  for (auto& [handle, graph] : machine.graphs) machine.trace_graph(*graph);
}

void begin_capture(int64_t stream, int device, const std::string& mode) {
  auto& machine = Machine::get();
  auto queue = find(stream, device);
  using Mode = Capture::CaptureMode;
  TORCH_CHECK_VALUE(mode == "global" || mode == "thread_local" || mode == "relaxed", "capture mode ", mode,
                    " given; expected global, thread_local or relaxed");
  auto name = "begin capture of " + queue->actor;
  point("capture", [&] { return name; }, [&] { return capture_touches(queue); });
  Lock lock;
  machine.begin_capture(queue, mode == "global"    ? Mode::kGlobal
                               : mode == "relaxed" ? Mode::kRelaxed
                                                   : Mode::kThreadLocal);
}

// The capture became no graph: what waits for the end of its graph need not wait. Without the lock: it takes the GIL.
void give_up(const std::shared_ptr<Capture>& capture) {
  if (!capture) return;
  for (auto& fn : std::exchange(capture->on_destroy, {})) fn();
}

int64_t end_capture(int64_t stream, int device) {
  auto& machine = Machine::get();
  auto queue = find(stream, device);
  auto name = "end capture of " + queue->actor;
  point("capture", [&] { return name; }, [&] { return capture_touches(queue); });
  std::shared_ptr<Capture> failed;
  try {
    Lock lock;
    failed = queue->capture;
    auto graph = machine.end_capture(queue);
    machine.graphs[machine.next_handle] = graph;
    return machine.next_handle++;
  } catch (...) {
    if (!queue->capture) give_up(failed);
    throw;
  }
}

void abort_capture(int64_t stream, int device) {
  auto queue = find(stream, device);
  std::shared_ptr<Capture> capture;
  {
    Lock lock;
    capture = queue->capture;
    Machine::get().abort_capture(queue);
  }
  give_up(capture);
}

}  // namespace
}  // namespace anabranch::sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace anabranch::sim;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  auto& machine = Machine::get();

  // -- control of threads
  m.def("enroll", &enroll, release_gil());
  m.def("withdraw", &withdraw);
  m.def("set_hooks", [](py::object point, py::object amend) {
    auto take = [](py::object& o) { return o.is_none() ? nullptr : o.release().ptr(); };
    set_hooks(take(point), take(amend));
  });
  m.def("heads", &heads);
  m.def(
      "step",
      [&machine](const std::string& actor) {
        Lock lock;
        machine.step(by_actor(actor));
      },
      release_gil());
  m.def("all_done", [&machine](const std::vector<std::string>& needs) {
    for (auto& need : needs) {
      if (machine.pending(need)) return false;
    }
    return true;
  });
  m.def("idle", [&machine] {
    Lock lock;
    for (auto& queue : machine.queues()) {
      if (!queue->ops.empty()) return false;
    }
    return true;
  });
  m.def("thread_name", &thread_name);

  // -- the trace
  m.def("trace", &trace);
  m.def("emit", [&machine](const std::string& line) {
    Lock lock;
    if (machine.tracing) machine.emit(line);
  });
  m.def("tracing", [&machine] { return machine.tracing; });
  m.def("take_trace", [&machine] {
    std::string text;
    {
      Lock lock;
      text.swap(machine.trace);
    }
    return py::bytes(text);
  });
  m.def("take_captures", [&machine] {
    std::vector<std::string> texts;
    {
      Lock lock;
      texts.swap(machine.capture_traces);
    }
    py::list all;
    for (auto& text : texts) all.append(py::bytes(text));
    return all;
  });

  // -- threads that are not controlled
  m.def("policy", [&machine](const std::string& name, uint64_t seed) {
    Lock lock;
    TORCH_CHECK_VALUE(name == "fifo" || name == "lazy" || name == "random", "policy ", name,
                      " given; expected fifo, lazy or random");
    machine.policy = name;
    machine.random.seed(seed);
  });
  // As freeing memory and unloading code wait: it disturbs captures of other threads in global mode only.
  m.def("wait_as_free_does", [](int device) { synchronize_device(device, false); }, release_gil());
  m.def("synchronize", [](int device) { synchronize_device(device < 0 ? current_device() : device); }, release_gil());

  // -- kernels, errors
  m.def("launch", &launch);
  m.def("poisoned", &poisoned);
  // Kinds: alloc, launch (of anything), copy, graph, record, wait, capture, end of capture. The `nth` from now on fails
  // (0: none), and the `times` - 1 after it. Says whether a fault planted before was still waiting for its turn.
  m.def(
      "fail",
      [&machine](const std::string& kind, int64_t nth, int64_t times) {
        Lock lock;
        auto found = machine.faults.find(kind);
        bool waiting = found != machine.faults.end() && found->second.after > 0;
        if (nth <= 0)
          machine.faults.erase(kind);
        else
          machine.faults[kind] = {nth, times};
        return waiting;
      },
      py::arg("kind"), py::arg("nth"), py::arg("times") = 1);
  // What there is: to see that nothing is left behind.
  m.def("alive", [&machine] {
    Lock lock;
    py::dict all;
    all["graphs"] = machine.graphs.size();
    all["captures"] = machine.captures.size();
    all["events"] = machine.events.load();
    return all;
  });
  // Around a fork: a child must not find the machine in the middle of another thread's change, nor its lock held. The
  // child's only thread is not the one that the lock knows as its holder, so it gets a new one, before anything else.
  m.def("before_fork", [] { fork_lock = new Lock; });
  m.def("after_fork", [] { delete std::exchange(fork_lock, nullptr); });
  pthread_atfork(nullptr, nullptr, [] {
    if (std::exchange(fork_lock, nullptr)) new (&Machine::get().mutex) std::recursive_mutex;
  });
  m.def("asked", [&machine] { return machine.asked.load(); });
  m.def("lost", [&machine]() -> std::optional<std::string> {
    Lock lock;
    if (machine.error.empty()) return std::nullopt;
    return machine.error;
  });
  m.def("reset", [&machine] {
    Lock lock;
    machine.reset();
  });
  m.def("limit", [&machine](int device, int64_t bytes) {
    Lock lock;
    machine.limit[device] = bytes;
  });
  m.def("memory", [&machine](int device) {
    Lock lock;
    return std::make_pair(machine.allocated(device), machine.reserved(device));
  });

  // -- devices and streams
  m.def("seed_all", &seed_all);
  m.def("current_device", &current_device);
  m.def("exchange_device", &exchange_device);
  m.def("current_stream", [](int device) {
    Lock lock;
    return current_queue(device)->id;
  });
  m.def("new_stream", [&machine](int device, bool blocking) {
    Lock lock;
    return machine.new_stream(device, blocking)->id;
  });

  // -- pools
  m.def("pool_new", [&machine] {
    Lock lock;
    return machine.next_pool++;
  });
  m.def("pool_begin", &push_pool);
  m.def("pool_end", &pop_pool);
  m.def("pool_bytes", [&machine](int64_t pool) {
    Lock lock;
    return machine.pool_bytes(pool);
  });
  m.def("pool_trim", [&machine](int64_t pool) {
    Lock lock;
    machine.trim(pool);
  });

  // -- captures and graphs
  m.def("capture_begin", &begin_capture, release_gil());
  m.def("capture_end", &end_capture, release_gil());
  m.def("capture_abort", &abort_capture, release_gil());
  // What `fn` queues, as a graph. In one piece, so that an interrupt of Python code comes in `fn` or not at all.
  m.def("capture", [](int64_t stream, int device, const std::string& mode, const py::function& fn) {
    {
      py::gil_scoped_release release;
      begin_capture(stream, device, mode);
    }
    py::object result;
    try {
      result = fn();
    } catch (...) {
      py::gil_scoped_release release;
      abort_capture(stream, device);
      throw;
    }
    int64_t graph;
    {
      py::gil_scoped_release release;
      graph = end_capture(stream, device);
    }
    return py::make_tuple(graph, result);
  });
  m.def("capture_id", [](int64_t stream, int device) -> int64_t {
    auto queue = find(stream, device);
    Lock lock;
    return queue->capture ? queue->capture->id : 0;
  });
  m.def("relax", &exchange_relaxed);
  m.def(
      "graph_launch", [](int64_t graph, int64_t stream, int device) { launch_graph(graph, find(stream, device)); },
      release_gil());
  m.def("native_api", &native_api);
  m.def("graph_nodes", [&machine](int64_t graph) {
    Lock lock;
    return machine.graphs.at(graph)->nodes.size();
  });
  m.def("graph_on_destroy", [&machine](int64_t capture, py::function fn) {
    auto kept = keep(std::move(fn));
    Lock lock;
    for (auto& c : machine.captures) {
      if (c->id != capture) continue;
      c->on_destroy.push_back([kept] {
        py::gil_scoped_acquire gil;
        (*kept)();
      });
      return;
    }
    TORCH_CHECK_VALUE(false, "sim: no capture ", capture, " is under way");
  });
  m.def("graph_destroy", [&machine](int64_t graph) {
    std::shared_ptr<Graph> gone;
    {
      Lock lock;
      auto found = machine.graphs.find(graph);
      if (found == machine.graphs.end()) return;
      gone = found->second;
      machine.graphs.erase(found);
    }
    for (auto& fn : gone->on_destroy) fn();
  });
  m.def("workspace_load", [&machine](int64_t stream, int device) {
    auto queue = find(stream, device);
    Lock lock;
    machine.load_workspace(queue);
  });

  // -- latches
  m.def("latch_new", [&machine] {
    Lock lock;
    return machine.new_latch();
  });
  m.def(
      "latch_hold",
      [&machine](int64_t latch, int64_t stream, int device) {
        auto queue = find(stream, device);
        point(
            "latch", [&] { return "hold " + queue->actor; },
            [&] { return Touches{{"q" + queue->actor, 0, 1, kWrite}}; });
        Lock lock;
        machine.hold(latch, queue);
      },
      release_gil());
  m.def(
      "latch_open",
      [&machine](int64_t latch) {
        std::string name;
        {
          Lock lock;
          name = machine.latches.at(latch)->last;
        }
        point("latch", [] { return std::string("open a latch"); }, [&] { return Touches{{"x" + name, 0, 1, kGive}}; });
        Lock lock;
        machine.open_latch(latch);
      },
      release_gil());

  m.attr("devices") = kDevices;
}
