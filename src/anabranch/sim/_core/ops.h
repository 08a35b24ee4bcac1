// What the operators share. An operator is queued: the CPU kernel runs when the machine is stepped, over tensors that
// lie in device memory and own nothing, so that a block that was freed too early is seen.
//
// Threads: any. Nothing here takes the machine's mutex except through machine.h.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <utility>
#include <vector>

#include "machine.h"

namespace anabranch::sim {

// While PyTorch's own kernels are called: no autograd, autocast, transforms, Python modes or inference tensors of the
// calling thread. Queued work runs in whichever thread steps the machine; it must not inherit that thread's state.
class Below {
 public:
  Below();
  ~Below();
  Below(const Below&) = delete;
  Below& operator=(const Below&) = delete;

 private:
  c10::InferenceMode ordinary_{false};
  c10::impl::ForceDispatchKeyGuard keys_;
  at::impl::TorchFunctionDisabledState functions_;
};

// While queued work runs, besides: no warnings. They came when it was queued, if they are about the arguments.
class Running {
 public:
  Running() : quiet_(nobody()) {}

 private:
  static c10::WarningHandler* nobody();
  Below below_;
  c10::WarningUtils::WarningHandlerGuard quiet_;
};

// Tensors on `type` (CPU or meta) that stand for device tensors: the same sizes, strides and sharing of storage, so
// that kernels see the overlaps that are there. On the CPU they are the device's memory, without owning it; on meta
// they have none.
class Twins {
 public:
  explicit Twins(c10::DeviceType type) : type_(type) {}
  at::Tensor of(const at::Tensor& tensor);

 private:
  c10::DeviceType type_;
  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> storages_;
  std::vector<std::pair<c10::TensorImpl*, at::Tensor>> tensors_;
};

// A new tensor over the memory of `tensor` (of the CPU), owning the storage only: queued work keeps it.
at::Tensor keep(const at::Tensor& tensor);

inline bool on_sim(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSim;
}

// Adds the bytes of `tensor`, gaps left out while that takes few ranges.
void touch(std::vector<Range>& ranges, const at::Tensor& tensor, bool write);

// Gives a device tensor other sizes, strides and offset; grows its storage (a queued copy) where it is too small.
void reshape(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t offset);

// The host waits for the calling thread's current stream of `device`.
void synchronize_current(int device);
bool capturing(int device);

// -- random numbers ------------------------------------------------------------------------------------------------

// Takes the next seed from a generator of a sim device. Called when an operator is queued, never when it runs.
uint64_t draw(const at::Generator& generator);
const at::Generator& default_generator(int device);
at::Generator new_generator(int device);
void seed_all(uint64_t seed);

}  // namespace anabranch::sim
