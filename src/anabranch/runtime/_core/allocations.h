// What one thread allocates and frees while it captures. Device-generic: every caching allocator of PyTorch reports to
// the thread's profiler, and for as long as a log runs it sits in the profiler's place.
#pragma once

#include <cstdint>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/utils/pybind.h>

namespace anabranch::runtime {

/// Address, bytes (negative where the memory was freed), and how many steps had been captured by then. In the order in
/// which it happened.
using AllocationEvent = std::tuple<std::uint64_t, std::int64_t, std::int64_t>;

/// Notes what the calling thread allocates and frees on a device between begin() and end(), both called by that thread.
///
/// The sizes are the allocator's, rounded up by it; a free is noted when the tensor is freed, whenever its block comes
/// back. What another thread frees is not seen.
class AllocationLog {
 public:
  AllocationLog();
  ~AllocationLog();
  AllocationLog(const AllocationLog&) = delete;
  AllocationLog& operator=(const AllocationLog&) = delete;

  /// Throws where this thread is being profiled: there is one place for both, and the profiler needs it.
  ///
  /// graph: the CUgraph under capture, whose nodes are the steps that are counted; 0 counts none. That the driver lists
  /// nodes in the order of their capture is checked at each event: steps are -1 from where it did not.
  void begin(std::uint64_t graph);
  std::vector<AllocationEvent> end();

 private:
  class Steps;
  class Reporter;

  std::shared_ptr<Reporter> reporter_;
  std::shared_ptr<c10::ThreadLocalDebugInfo> before_;
  std::thread::id thread_;
  bool running_ = false;
};

/// Registers the class with a Python module.
void bind_allocations(pybind11::module_& m);

}  // namespace anabranch::runtime
