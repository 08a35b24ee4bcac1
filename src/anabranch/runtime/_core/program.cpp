#include "program.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <set>

// Declared here as in <ATen/autocast_mode.h>, which brings all of PyTorch's operators along: seconds of compiling.
namespace at::autocast {
TORCH_API bool is_autocast_enabled(at::DeviceType device_type);
TORCH_API void set_autocast_enabled(at::DeviceType device_type, bool enabled);
}  // namespace at::autocast

namespace anabranch::runtime {

Neutral::Neutral(c10::DeviceType device) : types_{device, c10::kCPU} {
  if (c10::InferenceMode::is_enabled()) normal_.emplace(false);
  for (size_t i = 0; i < types_.size(); ++i) {
    autocast_[i] = at::autocast::is_autocast_enabled(types_[i]);
    if (autocast_[i]) at::autocast::set_autocast_enabled(types_[i], false);
  }
}

Neutral::~Neutral() {
  for (size_t i = 0; i < types_.size(); ++i) {
    if (autocast_[i]) at::autocast::set_autocast_enabled(types_[i], true);
  }
}

Program::Program(std::vector<at::Tensor> weights, int inputs)
    : weights_(std::move(weights)), inputs_(inputs), slots_(static_cast<int>(weights_.size()) + inputs) {}

// Weights are the same at each call, and so are lists of them.
void Program::fold(Argument& argument) const {
  if (argument.kind == Argument::kSlot && static_cast<size_t>(argument.slot) < weights_.size()) {
    argument.kind = Argument::kConstant;
    argument.constant = weights_[static_cast<size_t>(argument.slot)];
  }
  if (argument.kind != Argument::kList) return;
  bool is_constant = true;
  for (auto& item : argument.items) {
    fold(item);
    is_constant = is_constant && item.kind == Argument::kConstant;
  }
  if (!is_constant) return;
  Slots none;
  argument.constant = value(argument, none);
  argument.kind = Argument::kConstant;
  argument.items.clear();
}

int Program::append(Step step) {
  for (auto& argument : step.arguments) fold(argument);
  step.first = slots_;
  slots_ += static_cast<int>(step.results);
  steps_.push_back(std::move(step));
  return steps_.back().first;
}

int Program::call(const std::string& name, const std::string& overload, const std::vector<Given>& given) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  only_aten_ = only_aten_ && name.rfind("aten::", 0) == 0;
  Step step(Kind::kCall, op.schema().returns().size(), arguments_of(op.schema(), given));
  step.op = op;
  return append(std::move(step));
}

int Program::pick(int slot, int index) {
  Argument list;
  list.kind = Argument::kSlot;
  list.slot = slot;
  Step step(Kind::kPick, 1, {list});
  step.picked = index;
  return append(std::move(step));
}

int Program::number(const std::string& name, const std::vector<Given>& given) {
  Step step(Kind::kNumber, 1, values_of(given));
  step.number = number_op(name);
  return append(std::move(step));
}

int Program::check(const Given& holds, const std::string& message) {
  Step step(Kind::kCheck, 0, {value_of(holds)});
  step.message = message;
  return append(std::move(step));
}

int Program::branch(const Given& condition, std::shared_ptr<const Program> yes, std::shared_ptr<const Program> no,
                    const std::vector<Given>& operands, size_t results) {
  auto arguments = values_of(operands);
  arguments.insert(arguments.begin(), value_of(condition));
  Step step(Kind::kBranch, results, std::move(arguments));
  only_aten_ = only_aten_ && yes->only_aten_ && no->only_aten_;
  step.yes = std::move(yes);
  step.no = std::move(no);
  return append(std::move(step));
}

void Program::finish(std::vector<int> results) {
  results_ = std::move(results);
  // Each value is let go of at its last use, so that its memory can serve later steps.
  std::set<int> needed(results_.begin(), results_.end());
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    for (size_t i = 0; i < step->results; ++i) {
      int slot = step->first + static_cast<int>(i);
      if (needed.insert(slot).second) step->unused.push_back(slot);
    }
    // From behind, as arguments are read from the front.
    auto use = [&](Argument& argument, auto& again) -> void {
      for (auto item = argument.items.rbegin(); item != argument.items.rend(); ++item) again(*item, again);
      if (argument.slot >= 0) argument.is_last = needed.insert(argument.slot).second;
    };
    for (auto argument = step->arguments.rbegin(); argument != step->arguments.rend(); ++argument) use(*argument, use);
  }
}

c10::IValue Program::value(const Argument& argument, Slots& slots) const {
  switch (argument.kind) {
    case Argument::kConstant:
      return argument.constant;
    case Argument::kSlot: {
      auto& slot = slots[static_cast<size_t>(argument.slot)];
      return argument.is_last ? std::move(slot) : slot;
    }
    case Argument::kNumber:
      return converted(slots[static_cast<size_t>(argument.slot)], argument.wanted);
    case Argument::kList:
      break;
  }
  auto fill = [&](auto list) -> c10::IValue {
    using T = typename decltype(list)::value_type;
    list.reserve(argument.items.size());
    for (auto& item : argument.items) list.push_back(value(item, slots).template to<T>());
    return list;
  };
  switch (argument.element->kind()) {
    case c10::TypeKind::TensorType:
      return fill(c10::List<at::Tensor>());
    case c10::TypeKind::OptionalType:
      return fill(c10::List<std::optional<at::Tensor>>());
    case c10::TypeKind::IntType:
      return fill(c10::List<int64_t>());
    case c10::TypeKind::FloatType:
      return fill(c10::List<double>());
    default:
      return fill(c10::impl::GenericList(argument.element));
  }
}

void Program::execute(Slots& slots, Values& results) const {
  torch::jit::Stack stack;
  for (auto& step : steps_) {
    auto* made = slots.data() + step.first;
    stack.clear();
    for (auto& argument : step.arguments) stack.push_back(value(argument, slots));
    switch (step.kind) {
      case Kind::kCall:
        step.op->callBoxed(stack);
        for (size_t i = 0; i < step.results; ++i) made[i] = std::move(stack[i]);
        break;
      case Kind::kPick: {
        // Of tensors mostly; of numbers, where an operator returns a size.
        auto list = stack[0].toListRef();
        made[0] = list.at(static_cast<size_t>(step.picked));
        break;
      }
      case Kind::kNumber:
        made[0] = compute(step.number, stack.data(), stack.size());
        break;
      case Kind::kCheck:
        if (!stack[0].isBool()) throw Declined{};
        TORCH_CHECK(stack[0].toBool(), step.message);
        break;
      case Kind::kBranch: {
        auto& program = is_true(stack[0]) ? *step.yes : *step.no;
        Slots inner(static_cast<size_t>(program.slots_));
        std::move(stack.begin() + 1, stack.end(), inner.begin() + static_cast<int64_t>(program.weights_.size()));
        Values returned;
        program.execute(inner, returned);
        for (size_t i = 0; i < step.results; ++i) made[i] = std::move(returned[i]);
        break;
      }
    }
    for (int slot : step.unused) slots[static_cast<size_t>(slot)] = c10::IValue();
  }
  for (int slot : results_) {
    auto at = static_cast<size_t>(slot);
    results.push_back(at < weights_.size() ? c10::IValue(weights_[at]) : slots[at]);
  }
}

bool Program::run(const at::Tensor* inputs, size_t count, const Values& numbers, c10::Device device,
                  Values& results) const {
  auto given = count + numbers.size();
  TORCH_CHECK(given == static_cast<size_t>(inputs_), "the program takes ", inputs_, " values, given ", given);
  Neutral neutral(device.type());
  // Nothing here is recorded for a backward pass. What others register may rely on being asked all the same.
  std::optional<at::AutoDispatchBelowAutograd> below;
  if (only_aten_) below.emplace();
  Slots slots(static_cast<size_t>(slots_));
  auto rest = std::copy(inputs, inputs + count, slots.begin() + static_cast<int64_t>(weights_.size()));
  std::copy(numbers.begin(), numbers.end(), rest);
  try {
    execute(slots, results);
  } catch (Declined&) {
    results.clear();
    return false;
  }
  return true;
}

}  // namespace anabranch::runtime
