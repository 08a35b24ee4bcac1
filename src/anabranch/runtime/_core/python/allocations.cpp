// What one thread allocates and frees while it captures. Device-generic: every caching allocator of PyTorch reports to
// the thread's profiler, and for as long as a log runs it sits in the profiler's place.
#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>
#include <torch/csrc/utils/pybind.h>

namespace anabranch::runtime {

namespace profiler = torch::profiler::impl;

namespace {

/// Address, bytes (negative where the memory was freed), and how many steps had been captured by then. In the order in
/// which it happened.
using AllocationEvent = std::tuple<std::uint64_t, std::int64_t, std::int64_t>;

/// The nodes of a graph that grows.
class Steps {
 public:
  explicit Steps(std::uint64_t graph) : graph_(reinterpret_cast<void*>(graph)) {
    if (graph_ == nullptr) return;
    // Where there is a graph, the driver is loaded. (This file knows no CUDA: it is compiled where there is none, too.)
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (driver != nullptr) {
      list_ = reinterpret_cast<List>(dlsym(driver, "cuGraphGetNodes"));
      dlclose(driver);
    }
    in_order_ = list_ != nullptr;
  }

  /// How many there are, if those of last time are still the first ones, else -1 from here on.
  std::int64_t count() {
    if (graph_ == nullptr || !in_order_) return in_order_ ? 0 : -1;
    std::size_t count = 0;
    in_order_ = list_(graph_, nullptr, &count) == 0 && count >= nodes_.size();
    if (in_order_ && count > nodes_.size()) {
      std::vector<void*> now(count);
      in_order_ = list_(graph_, now.data(), &count) == 0 && count == now.size() &&
                  std::equal(nodes_.begin(), nodes_.end(), now.begin());
      nodes_ = std::move(now);
    }
    return in_order_ ? static_cast<std::int64_t>(nodes_.size()) : -1;
  }

 private:
  using List = int (*)(void* graph, void** nodes, std::size_t* count);

  void* graph_;
  List list_ = nullptr;
  bool in_order_ = true;
  std::vector<void*> nodes_;
};

// A profiler's state, not merely a MemoryReportingInfoBase: PyTorch casts what it finds in this slot to
// ProfilerStateBase without asking (profilerEnabled() does, which Inductor's launchers call while any thread is being
// profiled).
class Reporter final : public profiler::ProfilerStateBase {
 public:
  explicit Reporter(std::uint64_t graph)
      : ProfilerStateBase(profiler::ProfilerConfig(profiler::ProfilerState::Disabled)), steps(graph) {}

  // Called with the allocator's lock held: no Python here.
  void reportMemoryUsage(void* address, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) events.emplace_back(reinterpret_cast<std::uint64_t>(address), bytes, steps.count());
  }
  void reportOutOfMemory(int64_t, size_t, size_t, c10::Device) override {}
  bool memoryProfilingEnabled() const override { return true; }
  profiler::ActiveProfilerType profilerType() override { return profiler::ActiveProfilerType::NONE; }

  std::vector<AllocationEvent> events;
  Steps steps;
};

/// Notes what the calling thread allocates and frees on a device between begin() and end(), both called by that thread.
///
/// The sizes are the allocator's, rounded up by it; a free is noted when the tensor is freed, whenever its block comes
/// back. What another thread frees is not seen.
class AllocationLog {
 public:
  AllocationLog() = default;
  ~AllocationLog() {
    // On another thread there is nothing to be done: the slot is that thread's, and it keeps the reporter alive.
    if (running_ && std::this_thread::get_id() == thread_) restore();
  }
  AllocationLog(const AllocationLog&) = delete;
  AllocationLog& operator=(const AllocationLog&) = delete;

  /// Throws where this thread is being profiled: there is one place for both, and the profiler needs it.
  ///
  /// graph: the CUgraph under capture, whose nodes are the steps that are counted; 0 counts none. That the driver lists
  /// nodes in the order of their capture is checked at each event: steps are -1 from where it did not.
  void begin(std::uint64_t graph) {
    TORCH_CHECK(!running_, "this log of allocations is running already");
    TORCH_CHECK(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == nullptr,
                "a profiler watches this thread, and allocations can be reported to one listener only");
    reporter_ = std::make_shared<Reporter>(graph);
    before_ = c10::ThreadLocalDebugInfo::current();
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, reporter_);
    thread_ = std::this_thread::get_id();
    running_ = true;
  }

  std::vector<AllocationEvent> end() {
    TORCH_CHECK(running_, "this log of allocations is not running");
    TORCH_CHECK(std::this_thread::get_id() == thread_, "a log of allocations ends on the thread that began it");
    restore();
    running_ = false;
    std::vector<AllocationEvent> events = std::move(reporter_->events);
    if (reporter_->steps.count() < 0) {  // of the last event on, too
      for (AllocationEvent& event : events) std::get<2>(event) = -1;
    }
    reporter_.reset();
    return events;
  }

 private:
  void restore() { c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(std::move(before_)); }

  std::shared_ptr<Reporter> reporter_;
  std::shared_ptr<c10::ThreadLocalDebugInfo> before_;
  std::thread::id thread_;
  bool running_ = false;
};

}  // namespace

void bind_allocations(pybind11::module_& m) {
  pybind11::class_<AllocationLog>(m, "AllocationLog")
      .def(pybind11::init<>())
      .def("begin", &AllocationLog::begin, pybind11::arg("graph") = 0)
      .def("end", &AllocationLog::end);
}

}  // namespace anabranch::runtime
