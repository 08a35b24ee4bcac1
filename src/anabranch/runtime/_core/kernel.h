#pragma once

#include <c10/util/SmallVector.h>

#include <array>
#include <cstring>
#include <vector>

#include "device.h"

namespace anabranch::runtime {

// Kernels with the places in their parameters where the addresses of a call's inputs and results belong.
struct Kernel {
  void* node = nullptr;                                                // in the graph, if it is part of one
  void *function = nullptr, *kernel = nullptr, *cu_context = nullptr;  // see KernelLaunch
  std::array<unsigned, 3> grid, block;
  unsigned shared_bytes = 0;
  std::vector<char> params;
  std::vector<size_t> offsets;  // of each parameter in `params`
  bool packed = false;          // the driver takes them together
  struct Patch {
    size_t at;      // in `params`
    int buffer;     // inputs first, then regions of the results
    int64_t delta;  // bytes
  };
  std::vector<Patch> patches;
  bool is_set = false;  // the graph has what `params` says
};

// A kernel's parameters with addresses written in, as the driver wants them. Inline: calls make one a kernel.
class KernelArguments {
 public:
  // `params`: the kernel's own, or a copy of them, to write to.
  KernelArguments(const Kernel& kernel, char* params, const void* const* buffers) : kernel_(kernel) {
    for (auto& patch : kernel.patches) {
      auto address = static_cast<const char*>(buffers[patch.buffer]) + patch.delta;
      changed_ = changed_ || std::memcmp(params + patch.at, &address, sizeof address) != 0;
      std::memcpy(params + patch.at, &address, sizeof address);
    }
    if (kernel.packed) {
      size_ = kernel.params.size();
      extra_ = {kBuffer, params, kBufferSize, &size_, nullptr};
    } else {
      for (auto offset : kernel.offsets) pointers_.push_back(params + offset);
    }
  }
  // Whether other addresses were there before.
  bool changed() const { return changed_; }
  KernelLaunch launch() {
    return {kernel_.function,
            kernel_.kernel,
            kernel_.cu_context,
            kernel_.grid.data(),
            kernel_.block.data(),
            kernel_.shared_bytes,
            kernel_.packed ? nullptr : pointers_.data(),
            kernel_.packed ? extra_.data() : nullptr};
  }

 private:
  // CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE
  static inline void* const kBuffer = reinterpret_cast<void*>(1);
  static inline void* const kBufferSize = reinterpret_cast<void*>(2);
  const Kernel& kernel_;
  c10::SmallVector<void*, 32> pointers_;
  std::array<void*, 5> extra_{};
  size_t size_ = 0;
  bool changed_ = false;
};

}  // namespace anabranch::runtime
