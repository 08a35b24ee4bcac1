// The public face for C++ over one specialization of the runtime, without graphs.
#include "anabranch/engine.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "../runtime/_core/specialization.h"
#include "device.h"
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

}  // namespace

struct Engine::Impl {
  Impl(const Program& program, std::vector<at::Tensor> given_weights, std::vector<Input> given, c10::Device device,
       const runtime::DeviceApi* api)
      : inputs(std::move(given)), spec(device, api, specs_of(inputs), &limits, &counters), guard(device.type()) {
    for (size_t i = 0; i < given_weights.size(); ++i) {
      auto name = "weight " + std::to_string(i);
      auto& w = given_weights[i];
      if (!w.defined() || !runtime::is_plain(w)) {
        throw InputError(name + " is no plain tensor with memory; expected one. Pass w.clone().");
      }
      if (w.device() != device) {
        throw InputError(name + " is on " + w.device().str() + "; this engine runs on " + device.str() +
                         ". Pass w.to(\"" + device.str() + "\").");
      }
      if (runtime::extent(w).second > w.storage().nbytes())
        throw InputError(name +
                         " does not fit into its storage; expected a storage of all of its elements. Pass w.clone().");
      weights.push_back(as_given(w, w.detach()));
    }
    auto lowered = lower(program, weights, inputs.size());
    spec.program = std::move(lowered.program);
    outputs = std::move(lowered.outputs);
    if (!api) return;
    // What was written on this stream just before is there for every stream.
    guard.synchronizeStream(guard.getStream(device));
    if (weights.empty()) return;
    spec.has_weights = true;
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
  // and hands the memory out again when that is done: after every last use.
  //
  //     a caller's stream:  ... kernels that read the weights; record last use
  //     the retiring stream:                          wait for each last use; the allocator's event
  //     the next owner of the memory:                                              ... after that
  ~Impl() {
    if (!retiring) return;
    try {
      c10::DeviceGuard on(spec.device);
      std::vector<c10::Event*> last_uses;
      spec.events.for_each([&](runtime::Payload& p) { last_uses.push_back(static_cast<runtime::LastUse&>(p).done); });
      for (auto* event : last_uses) event->block(*retiring);
      for (auto& w : weights) guard.recordDataPtrOnStream(w.storage().data_ptr(), *retiring);
    } catch (...) {
      // The device is lost, or the process at its end: nothing says when a last use is over, so nothing is freed.
      (void)new std::vector<at::Tensor>(std::move(weights));
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> given) {
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
    runtime::Values computed;
    try {
      if (spec.run(given.data(), {}, nullptr, computed) != runtime::Specialization::Outcome::kDone) {
        throw NotCapturable(
            "this call is made while its stream is under capture, which engines in C++ cannot take part in. Call the"
            " engine outside the capture.");
      }
    } catch (runtime::DeviceError& e) {
      throw DeviceError(e.what());
    }
    std::vector<at::Tensor> results;
    for (auto slot : outputs) {
      auto i = static_cast<size_t>(slot);
      auto first = weights.size();
      results.push_back(i < first                   ? weights[i]
                        : i < first + inputs.size() ? given[i - first]
                                                    : computed[i - first - inputs.size()].toTensor());
    }
    return results;
  }

  std::vector<Input> inputs;
  std::vector<at::Tensor> weights;
  runtime::Limits limits{0, -1};
  runtime::Counters counters;
  runtime::Specialization spec;
  c10::impl::VirtualGuardImpl guard;
  std::vector<int64_t> outputs;  // see Lowered
  std::optional<c10::Stream> retiring;
};

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::Engine(const Program& program, std::vector<at::Tensor> weights, std::vector<Input> inputs, c10::Device device)
    : impl_([&] {
        device = checked(device);
        return std::make_shared<Impl>(program, std::move(weights), std::move(inputs), device, api_of(device));
      }()) {}

Engine Engine::load(const std::string& path, c10::Device device) {
  device = checked(device);
  auto file = read_program(path, device);
  for (auto& weight : file.weights) weight = as_given(weight, weight.detach().to(device));
  try {
    return Engine(file.program, std::move(file.weights), std::move(file.inputs), device);
  } catch (InputError& e) {
    throw InputError(path + ": " + e.what());
  }
}

std::vector<at::Tensor> Engine::run(at::ArrayRef<at::Tensor> inputs) const {
  return impl_->run(inputs);
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
