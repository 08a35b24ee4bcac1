#include "program.h"

#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>

// Declared here as in <ATen/autocast_mode.h>, which brings all of PyTorch's operators along: seconds of compiling.
namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
TORCH_API void set_autocast_enabled(at::DeviceType device_type, bool enabled);
}  // namespace at::autocast

namespace anabranch::runtime {

int Program::call(const std::string& name, const std::string& overload, std::vector<Argument> arguments) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  auto results = op.schema().returns().size();
  TORCH_CHECK(arguments.size() == op.schema().arguments().size(), name, " takes ", op.schema().arguments().size(),
              " arguments, given ", arguments.size());
  steps_.push_back({op, 0, std::move(arguments), slots_, results, {}});
  slots_ += static_cast<int>(results);
  return steps_.back().first;
}

int Program::pick(int slot, int index) {
  Argument list;
  list.kind = Argument::kSlot;
  list.slot = slot;
  steps_.push_back({std::nullopt, index, {list}, slots_, 1, {}});
  return slots_++;
}

void Program::finish(std::vector<int> results) {
  results_ = std::move(results);
  // Each value is let go of after its last use, so that its memory can serve later steps.
  std::set<int> needed(results_.begin(), results_.end());
  for (int i = 0; i < inputs_; ++i) needed.insert(i);  // the caller's, not ours to let go of
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    auto use = [&](int slot) {
      if (slot >= 0 && needed.insert(slot).second) step->last_uses.push_back(slot);
    };
    for (size_t i = 0; i < step->results; ++i) use(step->first + static_cast<int>(i));
    for (auto& argument : step->arguments) {
      use(argument.slot);
      for (int slot : argument.slots) use(slot);
    }
  }
}

namespace {

// As a call of the engine promises, whatever the caller is in the middle of.
struct Neutral {
  // A graph may hold numbers as tensors on the CPU, whatever its device.
  explicit Neutral(c10::DeviceType device) : types{device, c10::kCPU} {
    if (c10::InferenceMode::is_enabled()) normal.emplace(false);
    for (size_t i = 0; i < types.size(); ++i) {
      autocast[i] = at::autocast::is_autocast_enabled(types[i]);
      if (autocast[i]) at::autocast::set_autocast_enabled(types[i], false);
    }
  }
  ~Neutral() {
    for (size_t i = 0; i < types.size(); ++i) {
      if (autocast[i]) at::autocast::set_autocast_enabled(types[i], true);
    }
  }
  std::array<c10::DeviceType, 2> types;
  std::array<bool, 2> autocast{};
  std::optional<c10::InferenceMode> normal;
  at::NoGradGuard no_grad;
};

}  // namespace

std::vector<at::Tensor> Program::run(const std::vector<at::Tensor>& weights, const at::Tensor* inputs,
                                     size_t count) const {
  TORCH_CHECK(weights.size() + count == static_cast<size_t>(inputs_), "the program takes ", inputs_, " tensors, given ",
              weights.size() + count);
  auto device = count ? inputs[0].device() : weights.empty() ? c10::Device(c10::kCPU) : weights[0].device();
  Neutral neutral(device.type());
  std::vector<c10::IValue> slots(static_cast<size_t>(slots_));
  size_t at = 0;
  for (auto& weight : weights) slots[at++] = weight;
  for (size_t i = 0; i < count; ++i) slots[at++] = inputs[i];

  torch::jit::Stack stack;
  for (auto& step : steps_) {
    if (!step.op) {
      auto listed = slots[static_cast<size_t>(step.arguments[0].slot)].toTensorVector();
      slots[static_cast<size_t>(step.first)] = listed.at(static_cast<size_t>(step.picked));
      for (int slot : step.last_uses) slots[static_cast<size_t>(slot)] = c10::IValue();
      continue;
    }
    stack.clear();
    for (auto& argument : step.arguments) {
      switch (argument.kind) {
        case Argument::kSlot:
          stack.push_back(slots[static_cast<size_t>(argument.slot)]);
          break;
        case Argument::kConstant:
          stack.push_back(argument.constant);
          break;
        case Argument::kList:
          if (argument.optional) {
            c10::List<std::optional<at::Tensor>> list;
            for (int slot : argument.slots) {
              list.push_back(slot < 0 ? std::optional<at::Tensor>() : slots[static_cast<size_t>(slot)].toTensor());
            }
            stack.emplace_back(std::move(list));
          } else {
            c10::List<at::Tensor> list;
            for (int slot : argument.slots) list.push_back(slots[static_cast<size_t>(slot)].toTensor());
            stack.emplace_back(std::move(list));
          }
          break;
      }
    }
    step.op->callBoxed(stack);
    for (size_t i = 0; i < step.results; ++i) slots[static_cast<size_t>(step.first) + i] = std::move(stack[i]);
    for (int slot : step.last_uses) slots[static_cast<size_t>(slot)] = c10::IValue();
  }
  std::vector<at::Tensor> results;
  for (int slot : results_) results.push_back(slots[static_cast<size_t>(slot)].toTensor());
  return results;
}

}  // namespace anabranch::runtime
