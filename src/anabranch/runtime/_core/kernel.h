#pragma once

#include <c10/util/SmallVector.h>

#include <array>
#include <vector>

#include "device.h"

namespace anabranch::runtime {

// Kernels with the places in their parameters where the addresses of a call's inputs and results belong.
struct Kernel {
  void* node = nullptr;                                             // in the graph, if it is part of one
  void *function = nullptr, *kernel = nullptr, *context = nullptr;  // see KernelLaunch
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

// A kernel's parameters with addresses written in, as the driver wants them.
class KernelArguments {
 public:
  // `params`: the kernel's own, or a copy of them, to write to.
  KernelArguments(const Kernel& kernel, char* params, const void* const* buffers);
  // Whether other addresses were there before.
  bool changed() const { return changed_; }
  KernelLaunch launch();

 private:
  const Kernel& kernel_;
  c10::SmallVector<void*, 32> pointers_;
  std::array<void*, 5> extra_{};
  size_t size_ = 0;
  bool changed_ = false;
};

}  // namespace anabranch::runtime
