#include "allocations.h"

#include <pybind11/stl.h>

#include <c10/util/Exception.h>
#include <torch/csrc/profiler/orchestration/observer.h>

namespace anabranch::runtime {

namespace profiler = torch::profiler::impl;

// A profiler's state, not merely a MemoryReportingInfoBase: PyTorch casts what it finds in this slot to
// ProfilerStateBase without asking (profilerEnabled() does, which Inductor's launchers call while any thread is being
// profiled).
class AllocationLog::Reporter final : public profiler::ProfilerStateBase {
 public:
  Reporter() : ProfilerStateBase(profiler::ProfilerConfig(profiler::ProfilerState::Disabled)) {}

  // Called with the allocator's lock held: no Python here.
  void reportMemoryUsage(void* address, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) {
      events.emplace_back(reinterpret_cast<std::uint64_t>(address), bytes);
    }
  }
  void reportOutOfMemory(int64_t, size_t, size_t, c10::Device) override {}
  bool memoryProfilingEnabled() const override { return true; }
  profiler::ActiveProfilerType profilerType() override { return profiler::ActiveProfilerType::NONE; }

  std::vector<AllocationEvent> events;
};

AllocationLog::AllocationLog() = default;

AllocationLog::~AllocationLog() {
  // On another thread there is nothing to be done: the slot is that thread's, and it keeps the reporter alive.
  if (running_ && std::this_thread::get_id() == thread_) {
    c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(std::move(before_));
  }
}

void AllocationLog::begin() {
  TORCH_CHECK(!running_, "this log of allocations is running already");
  TORCH_CHECK(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE) == nullptr,
              "a profiler watches this thread, and allocations can be reported to one listener only");
  reporter_ = std::make_shared<Reporter>();
  before_ = c10::ThreadLocalDebugInfo::current();
  c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, reporter_);
  thread_ = std::this_thread::get_id();
  running_ = true;
}

std::vector<AllocationEvent> AllocationLog::end() {
  TORCH_CHECK(running_, "this log of allocations is not running");
  TORCH_CHECK(std::this_thread::get_id() == thread_, "a log of allocations ends on the thread that began it");
  c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(std::move(before_));
  running_ = false;
  std::vector<AllocationEvent> events = std::move(reporter_->events);
  reporter_.reset();
  return events;
}

void bind_allocations(pybind11::module_& m) {
  pybind11::class_<AllocationLog>(m, "AllocationLog")
      .def(pybind11::init<>())
      .def("begin", &AllocationLog::begin)
      .def("end", &AllocationLog::end);
}

}  // namespace anabranch::runtime
