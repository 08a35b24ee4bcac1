#include "call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <cstring>

#include "planted.h"

namespace anabranch::runtime {

namespace {

// Bytes. PyTorch's allocators hand out more; kernels that load 16 bytes at a time are chosen on this.
constexpr size_t kAlignment = 16;

void check(const char* call, int code) {
  if (code) throw DeviceError(call, code);
}

std::atomic<size_t> next_thread{0};

void fill(Values& results, Tensors&& tensors) {
  for (auto& y : tensors) results.emplace_back(std::move(y));
}

}  // namespace

bool is_plain(const at::Tensor& x) {
  using Key = c10::DispatchKey;
  constexpr auto ordinary =
      c10::DispatchKeySet({Key::Dense, Key::AutogradFunctionality, Key::AutogradOther, Key::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  auto* impl = x.unsafeGetTensorImpl();
  auto odd = (impl->key_set() - ordinary).raw_repr() & ~c10::full_backend_mask;
  return !odd && x.has_storage() && !x._fw_grad(0).defined();
}

// -- Counters --------------------------------------------------------------------------------------------------------

Counters::Shard& Counters::mine() {
  thread_local size_t number = next_thread.fetch_add(1, std::memory_order_relaxed);
  return shards_[number % kShards];
}

int64_t Counters::read(Name name) const {
  int64_t sum = 0;
  for (auto& shard : shards_) sum += shard.counts[name].load(names[name]);
  return sum;
}

// -- InputSpec -------------------------------------------------------------------------------------------------------

bool InputSpec::accepts(const at::Tensor& x) const {
  // First of all: a nested tensor has no sizes to ask for.
  if (!is_plain(x) || x.dtype() != caffe2::TypeMeta::fromScalarType(dtype)) return false;
  if (x.sizes() != c10::IntArrayRef(sizes)) return false;
  if (contiguous) return x.is_contiguous();
  return !x.is_contiguous() && x.strides() == c10::IntArrayRef(strides);
}

bool InputSpec::matches(const at::Tensor& x, size_t alignment) const {
  if (!x.numel()) return true;
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignment) return false;
  return contiguous ? x.is_contiguous() : x.strides() == c10::IntArrayRef(strides);
}

// -- Kernel ----------------------------------------------------------------------------------------------------------

namespace {

// A kernel's parameters with addresses written in, as the driver wants them.
class Arguments {
 public:
  // `params`: the kernel's own, or a copy of them, to write to.
  Arguments(const Kernel& kernel, char* params, const void* const* buffers) : kernel_(kernel) {
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
            kernel_.context,
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

}  // namespace

// -- Specialization --------------------------------------------------------------------------------------------------

Specialization::Specialization(c10::Device device, const DeviceApi* api, std::vector<InputSpec> specs, Limits* limits,
                               Counters* counters)
    : device(device), pool(limits), specs(std::move(specs)), api_(api), guard_(device.type()), counters_(counters) {}

bool Specialization::accepts(const at::Tensor* const* inputs, size_t count) const {
  if (count != specs.size()) return false;
  for (size_t i = 0; i < count; ++i) {
    if (inputs[i]->device() != device || !specs[i].accepts(*inputs[i])) return false;
  }
  return true;
}

Specialization::Outcome Specialization::run(const at::Tensor* inputs, const Values& numbers, const Builder& build,
                                            Values& results) {
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!is_plain(inputs[i])) return Outcome::kDeclined;
  }
  std::optional<c10::InferenceMode> normal;
  if (c10::InferenceMode::is_enabled()) normal.emplace(false);
  bool runs_direct = program || (numbers.empty() && (!kernels.empty() || python));
  if (!api_) {
    if (!runs_direct || !is_unchanged()) return Outcome::kDeclined;
    return finish_direct(direct(inputs, numbers, {}, results), results);
  }
  std::optional<c10::DeviceGuard> on_device;
  if (guard_.getDevice() != device) on_device.emplace(device);
  auto stream = guard_.getStream(device);
  StreamRef ref{guard_.getStreamNativeHandle(stream), stream.id(), device.index()};
  bool is_capturing = false;
  check("asking whether the stream is under capture", api_->is_capturing(ref, &is_capturing));
  if (is_capturing) return Outcome::kDeclined;

  if (uses_graphs) {
    auto acquired = pool.acquire(ref.id, may_grow.load("read"));
    if (acquired.kind == Pool::Acquired::kRoom) {
      auto built = build(acquired.reserved);
      acquired = built.slot    ? Pool::Acquired{Pool::Acquired::kContext, built.slot}
                 : built.retry ? pool.acquire(ref.id, false)
                               : Pool::Acquired{};
    }
    if (acquired.kind == Pool::Acquired::kContext) {
      if (acquired.waits) counters_->add(Counters::kWaits);
      auto& context = static_cast<Context&>(*acquired.slot->payload);
      try {
        auto regions = layout->allocate();
        launch(context, acquired.same_stream, inputs, stream, ref, regions);
        fill(results, layout->tensors(regions));
      } catch (...) {
        // Part of it may be queued: whatever that is, the context is freed after it, and used by no other call.
        auto discarded = pool.discard(acquired.slot);
        try {
          context.done->record(stream);
        } catch (...) {
          // Nothing says when the device is done with it, so it is never freed.
          (void)discarded.release();
        }
        throw;
      }
      pool.release(acquired.slot, ref.id);
      // The next user's wait may bind to the record before this one.
      if (planted("late record")) context.done->record(stream);
      counters_->add(Counters::kCalls);
      counters_->add(Counters::kGraphCalls);
      return Outcome::kDone;
    }
  }

  if (!runs_direct || !is_unchanged()) return Outcome::kDeclined;
  bool is_done = false;
  if (!has_weights) {
    is_done = direct(inputs, numbers, ref, results);
  } else {
    auto acquired = events.acquire(ref.id, true);
    auto* slot = acquired.kind == Pool::Acquired::kContext ? acquired.slot : events.add(new_event(ref.id), 0);
    auto& last_use = static_cast<Context&>(*slot->payload);
    try {
      // The stream may be a new one under the handle of one that died: what that one still runs stays covered.
      last_use.done->block(stream);
      is_done = direct(inputs, numbers, ref, results);
      last_use.done->record(stream);
    } catch (...) {
      try {
        last_use.done->record(stream);
      } catch (...) {
        // As after any error that lasts: the weights' own finalizer does not free them.
      }
      events.release(slot, ref.id);
      throw;
    }
    events.release(slot, ref.id);
  }
  return finish_direct(is_done, results);
}

// Another thread may be setting flags at any time: the look at them costs no GIL as long as they are what they were.
bool Specialization::is_unchanged() const {
  bool asks = program || kernels.empty();  // kernels by themselves were chosen at compile
  if (!flags_unchanged || !asks) return true;
  return (flags && flags_now() == flags) || flags_unchanged();
}

// What was queued under flags that changed meanwhile is thrown away, and so is what was given up.
Specialization::Outcome Specialization::finish_direct(bool is_done, Values& results) {
  if (!is_done || !is_unchanged()) {
    results.clear();
    return Outcome::kDeclined;
  }
  counters_->add(Counters::kCalls);
  counters_->add(Counters::kDirectCalls);
  return Outcome::kDone;
}

// Why no two calls can disturb each other here: the context is this thread's alone from acquire to release. Whatever an
// earlier call queued that touches the context's memory was queued before that call recorded `done`; everything that
// this call queues comes after the wait for it, on one stream; and the next call's wait binds to the record that this
// call makes last, because it can take the context only after that.
//
//     call A on stream 1                       call B on stream 2 (after A's release, on the host)
//     wait done; copy in; launch; copy out
//     record done  ------------------------->  wait done; copy in; launch; copy out; record done
//
// Where the graph reads and writes the caller's own memory there is nothing to copy; that memory is the caller's
// stream's, as with any operator. A stream that comes back to its context need not wait for itself, if it is one that
// is never destroyed: a handle that died may have been given to a new stream.
void Specialization::launch(Context& context, bool same_stream, const at::Tensor* inputs, const c10::Stream& stream,
                            const StreamRef& ref, const Regions& regions) {
  if (planted("no wait")) same_stream = true;  // as if every stream were the last one
  if (!same_stream || !api_->is_lasting || !api_->is_lasting(ref)) wait(*context.done, stream, ref);
  c10::SmallVector<const void*, 8> buffers;
  Tensors read;  // what is read where the caller has it, or a copy that kernels can read
  for (size_t i = 0; i < specs.size(); ++i) {
    auto& x = inputs[i];
    auto& at = context.inputs[i];
    if (!at.defined()) {
      read.push_back(canonical(x, i));
      buffers.push_back(read.back().const_data_ptr());
      continue;
    }
    if (!specs[i].matches(x, kAlignment)) {
      at.copy_(x);
    } else if (specs[i].bytes) {
      check("copying an input", api_->copy(at.data_ptr(), x.const_data_ptr(), specs[i].bytes, ref));
    }
    buffers.push_back(nullptr);
  }
  for (auto& region : regions) buffers.push_back(region.data);
  for (auto& kernel : context.kernels) {
    // The context's own parameters, as its graph has them since its last call; the context is this call's. The
    // allocator often hands out the memory again that the last call's results had.
    Arguments arguments(kernel, kernel.params.data(), buffers.data());
    if (kernel.is_set && !arguments.changed()) continue;
    kernel.is_set = false;
    check("setting the parameters of a graph's kernel", api_->patch(context.graph, kernel.node, arguments.launch()));
    kernel.is_set = true;
  }
  check("launching a graph", api_->launch(context.graph, ref));
  for (size_t r = 0; r < regions.size(); ++r) {
    if (context.results[r] && layout->bytes(r)) {
      check("copying a result", api_->copy(regions[r].data, context.results[r], layout->bytes(r), ref));
    }
  }
  if (!planted("no record") && !planted("late record")) record(*context.done, stream, ref);
}

// An event comes to be, and PyTorch takes notice of it, at its first record.
void Specialization::wait(const c10::Event& event, const c10::Stream& stream, const StreamRef& ref) const {
  if (!api_->wait || !event.was_marked_for_recording()) return event.block(stream);
  check("waiting for a context's last use", api_->wait(event.eventId(), ref));
}

void Specialization::record(c10::Event& event, const c10::Stream& stream, const StreamRef& ref) const {
  if (!api_->record || !event.was_marked_for_recording()) return event.record(stream);
  check("recording a context's use", api_->record(event.eventId(), ref));
}

// `x`, or a copy of it with the strides and the alignment that the kernels were compiled (and algorithms chosen) for.
at::Tensor Specialization::canonical(const at::Tensor& x, size_t i) const {
  if (specs[i].matches(x, alignment)) return x;
  return at::empty_strided(specs[i].sizes, specs[i].strides, x.options()).copy_(x);
}

// The kernels without a graph, on the current stream. False: this call takes another way.
bool Specialization::direct(const at::Tensor* inputs, const Values& numbers, const StreamRef& ref, Values& results) {
  if (program && device.is_cpu()) {
    // PyTorch's operators take any layout, and give eager's bits for it. Elsewhere graphs give those of a dense copy.
    return program->run(inputs, specs.size(), numbers, device, results);
  }
  Tensors read;
  for (size_t i = 0; i < specs.size(); ++i) read.push_back(canonical(inputs[i], i));
  if (program) return program->run(read.data(), read.size(), numbers, device, results);
  if (kernels.empty()) {
    Neutral neutral(device.type());
    python({read.begin(), read.end()}, results);
    return true;
  }
  auto regions = layout->allocate();
  c10::SmallVector<const void*, 8> buffers;
  for (auto& x : read) buffers.push_back(x.const_data_ptr());
  for (auto& region : regions) buffers.push_back(region.data);
  for (auto& kernel : kernels) {
    c10::SmallVector<char, 512> params(kernel.params.begin(), kernel.params.end());
    Arguments arguments(kernel, params.data(), buffers.data());
    check("launching a kernel", api_->launch_kernel(arguments.launch(), ref));
  }
  fill(results, layout->tensors(regions));
  return true;
}

}  // namespace anabranch::runtime
