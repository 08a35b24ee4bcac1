#include "kernel.h"

#include <cstring>

namespace anabranch::runtime {

namespace {

// CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE
void* const kBuffer = reinterpret_cast<void*>(1);
void* const kBufferSize = reinterpret_cast<void*>(2);

}  // namespace

KernelArguments::KernelArguments(const Kernel& kernel, char* params, const void* const* buffers) : kernel_(kernel) {
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

KernelLaunch KernelArguments::launch() {
  return {kernel_.function,
          kernel_.kernel,
          kernel_.context,
          kernel_.grid.data(),
          kernel_.block.data(),
          kernel_.shared_bytes,
          kernel_.packed ? nullptr : pointers_.data(),
          kernel_.packed ? extra_.data() : nullptr};
}

}  // namespace anabranch::runtime
