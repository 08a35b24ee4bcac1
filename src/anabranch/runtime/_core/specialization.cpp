#include "specialization.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include "planted.h"

namespace anabranch::runtime {

namespace {

// Bytes. PyTorch's allocators hand out more; kernels that load 16 bytes at a time are chosen on this.
constexpr size_t kAlignment = 16;

void check(const char* call, int code) {
  if (code) throw DeviceError(call, code);
}

void fill(Values& results, Tensors&& tensors) {
  for (auto& y : tensors) results.emplace_back(std::move(y));
}

// A defect that tests plant: as if a graph was bound for good to the state of the session that called it first.
const at::Tensor* of_first_session(const at::Tensor* inputs, const std::vector<InputSpec>& specs) {
  static auto& first = *new Tensors(inputs, inputs + specs.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!specs[i].written) first[i] = inputs[i];
  }
  return first.data();
}

}  // namespace

Specialization::Specialization(c10::Device device, const DeviceApi* api, std::vector<InputSpec> given, Limits* limits,
                               Counters* counters)
    : device(device), pool(limits), specs(std::move(given)), api_(api), guard_(device.type()), counters_(counters) {
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].written) written.push_back(i);
    owned += specs[i].owned;
  }
}

bool Specialization::accepts(const at::Tensor* const* inputs, size_t count) const {
  if (count + owned != specs.size()) return false;
  for (size_t i = 0; i < count; ++i) {
    if (inputs[i]->device() != device || !specs[i].accepts(*inputs[i])) return false;
  }
  return true;
}

Specialization::Outcome Specialization::run(const at::Tensor* inputs, const Values& numbers, const Builder& build,
                                            Values& results, SessionOrder* session) {
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!is_plain(inputs[i])) return Outcome::kDeclined;
  }
  if (!written.empty() && !may_write && !can_write(inputs)) return Outcome::kDeclined;
  uses.store(uses.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);  // one more or less: see there
  std::optional<c10::InferenceMode> normal;
  if (c10::InferenceMode::is_enabled()) normal.emplace(false);
  if (!api_) return run_direct(inputs, numbers, nullptr, results);
  std::optional<c10::DeviceGuard> on_device;
  if (guard_.getDevice() != device) on_device.emplace(device);
  auto stream = guard_.getStream(device);
  CallerStream caller{stream, {guard_.getStreamNativeHandle(stream), stream.id(), device.index()}};
  bool is_capturing = false;
  check("asking whether the stream is under capture", api_->is_capturing(caller.ref, &is_capturing));
  if (is_capturing) return Outcome::kDeclined;
  Relaxed relaxed(*api_);
  if (!session) return run_on(caller, inputs, numbers, build, results);
  bool follows = session->stream == caller.ref.id && api_->is_lasting && api_->is_lasting(caller.ref);
  if (!follows && !planted("no wait of a session")) wait(*session->done, caller);
  auto outcome = Outcome::kDeclined;
  try {
    outcome = run_on(caller, inputs, numbers, build, results);
  } catch (...) {
    session->stream = -1;
    session->done->record(caller.stream);  // part of it may be queued
    throw;
  }
  if (outcome == Outcome::kDone) {
    record(*session->done, caller);
    session->stream = caller.ref.id;
  }
  return outcome;
}

Specialization::Outcome Specialization::run_on(const CallerStream& caller, const at::Tensor* inputs,
                                               const Values& numbers, const Builder& build, Values& results) {
  if (uses_graphs) {
    auto acquired = acquire(caller, build);
    if (acquired.kind == Pool::Acquired::kContext) return run_graph(acquired, inputs, caller, results);
  }
  return run_direct(inputs, numbers, &caller, results);
}

// Whether what is to be written can be written where it is: there is no other tensor's memory, and no copy is needed.
// Python knows what to do about the rest, or what is wrong with it.
bool Specialization::can_write(const at::Tensor* inputs) const {
  for (auto i : written) {
    auto& x = inputs[i];
    if (!specs[i].matches(x, alignment) || x.is_inference()) return false;
    for (size_t j = 0; j < specs.size() && !specs[i].owned; ++j) {
      if (j != i && !specs[j].owned && may_share(x, inputs[j])) return false;
    }
  }
  return true;
}

Specialization::Outcome Specialization::done(Counters::Name way) {
  counters_->add(Counters::kCalls);
  counters_->add(way);
  return Outcome::kDone;
}

// A context of the pool, or one that is built now.
Pool::Acquired Specialization::acquire(const CallerStream& caller, const Builder& build) {
  auto acquired = pool.acquire(caller.ref.id, may_grow.load("read"));
  if (acquired.kind != Pool::Acquired::kRoom) return acquired;
  auto built = build(acquired.reserved);
  if (built.slot) return {.kind = Pool::Acquired::kContext, .slot = built.slot};
  return built.retry ? pool.acquire(caller.ref.id, false) : Pool::Acquired{};
}

Specialization::Outcome Specialization::run_graph(const Pool::Acquired& acquired, const at::Tensor* inputs,
                                                  const CallerStream& caller, Values& results) {
  if (acquired.waits) counters_->add(Counters::kWaits);
  auto& context = static_cast<Context&>(*acquired.slot->payload);
  try {
    auto regions = layout->allocate();
    launch(context, acquired.same_stream, inputs, caller, regions);
    note_writes(inputs);
    fill(results, layout->tensors(regions));
  } catch (...) {
    // Part of it may be queued: whatever that is, the context is freed after it, and used by no other call.
    auto discarded = pool.discard(acquired.slot);
    try {
      context.done->record(caller.stream);
    } catch (...) {
      // Nothing says when the device is done with it, so it is never freed.
      (void)discarded.release();
    }
    throw;
  }
  pool.release(acquired.slot, caller.ref.id);
  // The next user's wait may bind to the record before this one.
  if (planted("late record")) context.done->record(caller.stream);
  return done(Counters::kGraphCalls);
}

Specialization::Outcome Specialization::run_direct(const at::Tensor* inputs, const Values& numbers,
                                                   const CallerStream* caller, Values& results) {
  bool runs_direct = program || (numbers.empty() && (!kernels.empty() || python));
  // What was written under other flags could not be thrown away.
  bool is_final = !written.empty() && flags_unchanged && (program || kernels.empty());
  if (!runs_direct || is_final || !is_unchanged()) return Outcome::kDeclined;
  bool is_done = caller && has_weights ? direct_using_weights(inputs, numbers, *caller, results)
                                       : direct(inputs, numbers, caller ? caller->ref : StreamRef{}, results);
  // What was queued under flags that changed meanwhile is thrown away, and so is what was given up.
  if (is_done && is_unchanged()) {
    note_writes(inputs);
    return done(Counters::kDirectCalls);
  }
  results.clear();
  return Outcome::kDeclined;
}

// Kernels write past PyTorch, which looks at versions where a graph for gradients has kept a tensor.
void Specialization::note_writes(const at::Tensor* inputs) const {
  for (auto i : written) inputs[i].unsafeGetTensorImpl()->bump_version();
}

// Another thread may be setting flags at any time: the look at them costs no GIL as long as they are what they were.
bool Specialization::is_unchanged() const {
  bool asks = program || kernels.empty();  // kernels by themselves were chosen at compile
  if (!flags_unchanged || !asks) return true;
  return (flags && flags_now() == flags) || flags_unchanged();
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
void Specialization::launch(Context& context, bool same_stream, const at::Tensor* inputs, const CallerStream& caller,
                            const Regions& regions) {
  auto& ref = caller.ref;
  if (planted("no wait")) same_stream = true;  // as if every stream were the last one
  if (planted("first session")) inputs = of_first_session(inputs, specs);
  if (!same_stream || !api_->is_lasting || !api_->is_lasting(ref)) wait(*context.done, caller);
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
    KernelArguments arguments(kernel, kernel.params.data(), buffers.data());
    if (kernel.is_set && !arguments.changed()) continue;
    kernel.is_set = false;
    check("setting the parameters of a graph's kernel", api_->patch(context.graph, kernel.node, arguments.launch()));
    kernel.is_set = true;
  }
  check("launching a graph", api_->launch(context.graph, ref));
  auto copy_back = [&] {
    for (auto i : written) {
      auto& at = context.inputs[i];
      if (at.defined() && specs[i].bytes) {
        check("copying what was written", api_->copy(inputs[i].data_ptr(), at.const_data_ptr(), specs[i].bytes, ref));
      }
    }
  };
  if (!planted("late copy back")) copy_back();
  for (size_t r = 0; r < regions.size(); ++r) {
    if (context.results[r] && layout->bytes(r)) {
      check("copying a result", api_->copy(regions[r].data, context.results[r], layout->bytes(r), ref));
    }
  }
  if (!planted("no record") && !planted("late record")) record(*context.done, caller);
  if (planted("late copy back")) copy_back();
}

// An event comes to be, and PyTorch takes notice of it, at its first record.
void Specialization::wait(const c10::Event& event, const CallerStream& caller) const {
  if (!api_->wait || !event.was_marked_for_recording()) return event.block(caller.stream);
  check("waiting for a context's last use", api_->wait(event.eventId(), caller.ref));
}

void Specialization::record(c10::Event& event, const CallerStream& caller) const {
  if (!api_->record || !event.was_marked_for_recording()) return event.record(caller.stream);
  check("recording a context's use", api_->record(event.eventId(), caller.ref));
}

// `x`, or a copy of it with the strides and the alignment that the kernels were compiled (and algorithms chosen) for.
at::Tensor Specialization::canonical(const at::Tensor& x, size_t i) const {
  if (specs[i].matches(x, alignment)) return x;
  return at::empty_strided(specs[i].sizes, specs[i].strides, x.options()).copy_(x);
}

// `direct`, and its end is the weights' last use on this stream.
bool Specialization::direct_using_weights(const at::Tensor* inputs, const Values& numbers, const CallerStream& caller,
                                          Values& results) {
  auto acquired = events.acquire(caller.ref.id, true);
  auto* slot = acquired.kind == Pool::Acquired::kContext ? acquired.slot : events.add(new_event(caller.ref.id), 0);
  auto& last_use = static_cast<LastUse&>(*slot->payload);
  bool is_done = false;
  try {
    // The stream may be a new one under the handle of one that died: what that one still runs stays covered.
    last_use.done->block(caller.stream);
    is_done = direct(inputs, numbers, caller.ref, results);
    last_use.done->record(caller.stream);
  } catch (...) {
    try {
      last_use.done->record(caller.stream);
    } catch (...) {
      // As after any error that lasts: the weights' own finalizer does not free them.
    }
    events.release(slot, caller.ref.id);
    throw;
  }
  events.release(slot, caller.ref.id);
  return is_done;
}

// The kernels without a graph, on the current stream. False: this call takes another way.
bool Specialization::direct(const at::Tensor* inputs, const Values& numbers, const StreamRef& ref, Values& results) {
  if (program && device.is_cpu()) {
    // PyTorch's operators take any layout, and give eager's bits for it. Elsewhere graphs give those of a dense copy.
    return program->run(inputs, specs.size(), numbers, {device, api_, ref}, results);
  }
  Tensors read;
  for (size_t i = 0; i < specs.size(); ++i) read.push_back(canonical(inputs[i], i));
  if (program) return program->run(read.data(), read.size(), numbers, {device, api_, ref}, results);
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
    KernelArguments arguments(kernel, params.data(), buffers.data());
    check("launching a kernel", api_->launch_kernel(arguments.launch(), ref));
  }
  fill(results, layout->tensors(regions));
  return true;
}

}  // namespace anabranch::runtime
