// The public face for C++ over one specialization of the runtime, without graphs.
#include "anabranch/engine.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include <set>

#include "../runtime/_core/tensors.h"
#include "device.h"
#include "engine_impl.h"
#include "file.h"
#include "inputs.h"
#include "lowering.h"
#include "tests.h"

namespace anabranch {

namespace {

// `made` of a weight's values. Some operators look whether a tensor requires a gradient, even with autograd off, and
// choose by it among kernels that round otherwise.
at::Tensor as_given(const at::Tensor& weight, at::Tensor made) {
  made.set_requires_grad(weight.requires_grad());
  return made;
}

// `letter`: what the message calls it.
void check_tensor(const at::Tensor& x, const std::string& name, const std::string& letter, c10::Device device) {
  if (!x.defined() || !runtime::is_plain(x)) {
    throw InputError(name + " is no plain tensor with memory; expected one. Pass " + letter + ".clone().");
  }
  if (x.device() != device) {
    throw InputError(name + " is on " + x.device().str() + "; this engine runs on " + device.str() + ". Pass " +
                     letter + ".to(\"" + device.str() + "\").");
  }
  if (runtime::extent(x).second > x.storage().nbytes()) {
    throw InputError(name + " does not fit into its storage; expected a storage of all of its elements. Pass " +
                     letter + ".clone().");
  }
}

std::vector<State> checked_state(std::vector<State> given, c10::Device device) {
  std::set<std::string> names;
  for (auto& kept : given) {
    auto name = "state '" + kept.name + "'";
    check_tensor(kept.initial, name, "initial", device);
    if (!kept.initial.is_non_overlapping_and_dense()) {
      throw InputError(name + " is not dense in memory; expected a tensor that is. Pass initial.contiguous().");
    }
    if (!names.insert(kept.name).second) {
      throw InputError(name + " is given twice; expected one tensor of each name. Give each another name.");
    }
    kept.initial = kept.initial.detach();
  }
  return given;
}

[[noreturn]] void throw_not_capturable() {
  throw NotCapturable(
      "this call is made while its stream is under capture, which engines in C++ cannot take part in. Call the engine"
      " outside the capture.");
}

}  // namespace

Engine::Impl::Impl(const Program& program, std::vector<at::Tensor> given_weights, std::vector<Input> given,
                   c10::Device device, const runtime::DeviceApi* api, std::vector<State> given_state)
    : inputs(std::move(given)),
      state(checked_state(std::move(given_state), device)),
      spec(device, api, specs_of(inputs, state), &limits, &counters),
      guard(device.type()),
      api(api) {
  for (size_t i = 0; i < given_weights.size(); ++i) {
    auto& w = given_weights[i];
    check_tensor(w, "weight " + std::to_string(i), "w", device);
    weights.push_back(as_given(w, w.detach()));
  }
  auto lowered = lower(program, weights, spec.specs);
  spec.program = std::move(lowered.program);
  spec.may_write = true;
  outputs = std::move(lowered.outputs);
  if (!api) return;
  // What was written on this stream just before is there for every stream.
  guard.synchronizeStream(guard.getStream(device));
  if (weights.empty() && state.empty()) return;
  spec.has_weights = !weights.empty();
  spec.new_event = [type = device.type()](c10::StreamId) -> std::unique_ptr<runtime::Payload> {
    auto event = std::make_shared<c10::Event>(type);
    auto last_use = std::make_unique<runtime::LastUse>();
    last_use->done = event.get();
    last_use->owner = std::move(event);
    return last_use;
  };
  retiring = retiring_stream(device, *api);
}

// Why the weights are freed after their last use. Each direct call has recorded an event behind what it queued, in
// `spec.events`; no call is under way, because each is made through a handle. A caller's stream may be gone by now,
// so no weight is recorded on it. One stream of ours waits for all those events, and the weights are recorded on that
// one. When the last reference to a weight goes, below or later on, the allocator records an event of its own there,
// and hands the memory out again when that is done: after every last use. What state begins as is read by sessions
// alone, and those have ended: at its end each had the same stream wait for its own last use.
//
//     a caller's stream:  ... kernels that read the weights; record last use
//     the retiring stream:                          wait for each last use; the allocator's event
//     the next owner of the memory:                                              ... after that
Engine::Impl::~Impl() {
  if (!retiring) return;
  try {
    c10::DeviceGuard on(spec.device);
    std::vector<c10::Event*> last_uses;
    spec.events.for_each([&](runtime::Payload& p) { last_uses.push_back(static_cast<runtime::LastUse&>(p).done); });
    for (auto* event : last_uses) event->block(*retiring);
    for (auto& w : weights) guard.recordDataPtrOnStream(w.storage().data_ptr(), *retiring);
    for (auto& kept : state) guard.recordDataPtrOnStream(kept.initial.storage().data_ptr(), *retiring);
  } catch (...) {
    // The device is lost, or the process at its end: nothing says when a last use is over, so nothing is freed.
    (void)new std::vector<at::Tensor>(std::move(weights));
    (void)new std::vector<State>(std::move(state));
  }
}

void Engine::Impl::check_all(at::ArrayRef<at::Tensor> given) const {
  if (given.size() != inputs.size()) {
    throw InputError(std::to_string(given.size()) + " inputs given; this engine takes " +
                     std::to_string(inputs.size()));
  }
  bool grad = at::GradMode::is_enabled();
  for (size_t i = 0; i < given.size(); ++i) {
    auto& x = given[i];
    if (!x.defined() || x.device() != spec.device || !spec.specs[i].accepts(x)) check(x, i, inputs[i], spec.device);
    if (grad && x.requires_grad()) {
      throw InputError("input " + std::to_string(i) +
                       " requires grad; engines run inference only. Pass x.detach(), or call the engine under"
                       " at::NoGradGuard.");
    }
  }
  for (auto i : spec.written) {
    if (i < given.size()) check_written(given, i);
  }
}

void Engine::Impl::refuse_capture() const {
  if (!api) return;
  auto stream = guard.getStream(spec.device);
  bool is_capturing = false;
  int code = api->is_capturing({guard.getStreamNativeHandle(stream), stream.id(), spec.device.index()}, &is_capturing);
  if (code) throw DeviceError("asking whether the stream is under capture failed with code " + std::to_string(code));
  if (is_capturing) throw_not_capturable();
}

// `given` as operators may write it. Where that is a copy, `targets` has what it has to be copied back to. On the CPU
// operators write any layout.
runtime::Tensors Engine::Impl::writable(at::ArrayRef<at::Tensor> given, runtime::Tensors& targets) const {
  runtime::Tensors used(given.begin(), given.end());
  targets.resize(given.size());
  bool may_copy = false;
  for (auto i : spec.written) {
    if (i >= given.size()) continue;
    auto& x = used[i];
    auto& expected = spec.specs[i];
    if (x.is_inference()) {
      // The same memory, which may be written outside of inference mode, where calls run.
      x = runtime::view_of(x, {x.sizes().begin(), x.sizes().end()}, {x.strides().begin(), x.strides().end()}, 0);
    }
    if (!api || expected.matches(x, spec.alignment)) continue;
    if (!may_copy) refuse_capture();
    may_copy = true;
    targets[i] = x;
    x = at::empty_strided(expected.sizes, expected.strides, x.options()).copy_(targets[i]);
  }
  return used;
}

std::vector<at::Tensor> Engine::Impl::run(at::ArrayRef<at::Tensor> given, at::ArrayRef<at::Tensor> own,
                                          runtime::SessionOrder* session) {
  check_all(given);
  runtime::Values computed;
  bool is_done = false;
  auto queue = [&](const at::Tensor* all) {
    try {
      is_done = spec.run(all, {}, nullptr, computed, session) == runtime::Specialization::Outcome::kDone;
    } catch (runtime::DeviceError& e) {
      throw DeviceError(e.what());
    }
  };
  if (spec.written.empty() && own.empty()) {
    queue(given.data());
  } else {
    runtime::Neutral neutral(spec.device.type());
    std::optional<c10::DeviceGuard> on;
    if (api) on.emplace(spec.device);
    runtime::Tensors targets;
    auto all = writable(given, targets);
    all.append(own.begin(), own.end());
    queue(all.data());
    for (size_t i = 0; i < targets.size() && is_done; ++i) {
      if (targets[i].defined()) targets[i].copy_(all[i]);
    }
  }
  if (!is_done) throw_not_capturable();
  std::vector<at::Tensor> results;
  auto first = weights.size();
  auto end = first + spec.specs.size();
  for (auto slot : outputs) {
    auto i = static_cast<size_t>(slot);
    results.push_back(i < first ? weights[i] : i < end ? given[i - first] : computed[i - end].toTensor());
  }
  return results;
}

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::Engine(const Program& program, std::vector<at::Tensor> weights, std::vector<Input> inputs, c10::Device device,
               std::vector<State> state)
    : impl_([&] {
        device = checked(device);
        return std::make_shared<Impl>(program, std::move(weights), std::move(inputs), device, api_of(device),
                                      std::move(state));
      }()) {}

Engine Engine::load(const std::string& path, c10::Device device) {
  device = checked(device);
  auto file = read_program(path, device);
  for (auto& weight : file.weights) weight = as_given(weight, weight.detach().to(device));
  for (auto& kept : file.state) kept.initial = kept.initial.to(device);
  try {
    return Engine(file.program, std::move(file.weights), std::move(file.inputs), device, std::move(file.state));
  } catch (InputError& e) {
    throw InputError(path + ": " + e.what());
  }
}

std::vector<at::Tensor> Engine::run(at::ArrayRef<at::Tensor> inputs) const {
  auto& state = impl_->state;
  if (!state.empty()) {
    std::string names;
    for (size_t i = 0; i < state.size() && i < 3; ++i) names += (i ? ", '" : "'") + state[i].name + "'";
    if (state.size() > 3) names += " and " + std::to_string(state.size() - 3) + " more";
    throw NeedsSession(
        "an engine was run itself, and its model keeps state (" + names +
        "), which is a session's. Make one with auto session = engine.session(), and call session.run().");
  }
  return impl_->run(inputs, {}, nullptr);
}

c10::Device Engine::device() const {
  return impl_->spec.device;
}

const std::vector<Input>& Engine::inputs() const {
  return impl_->inputs;
}

Stats Engine::stats() const {
  using C = runtime::Counters;
  auto& counters = impl_->counters;
  return {counters.read(C::kCalls), counters.read(C::kDirectCalls), counters.read(C::kGraphCalls),
          counters.read(C::kWaits)};
}

const std::vector<at::Tensor>& Tests::weights(const Engine& engine) {
  return engine.impl_->weights;
}

}  // namespace anabranch
