#include "program.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include "tensors.h"

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

namespace {

std::vector<Argument> joined(std::initializer_list<const std::vector<Given>*> all) {
  std::vector<Argument> made;
  for (auto* given : all) {
    for (auto& x : *given) made.push_back(value_of(x));
  }
  return made;
}

// A tensor that steps read where it lies: a constant may be one, too.
Argument tensor_of(const Given& given) {
  if (given.kind == Argument::kSlot) return value_of(given);
  TORCH_CHECK_TYPE(given.kind == Argument::kConstant && given.constant, "expected a tensor");
  Argument argument;
  auto value = given.constant(c10::TensorType::get(), std::nullopt);
  // None comes as a tensor that is undefined.
  if (value.isTensor() && value.toTensor().defined()) argument.constant = std::move(value);
  return argument;
}

}  // namespace

int Program::empty(const std::vector<Given>& sizes, const std::vector<Given>& strides, at::ScalarType dtype) {
  Step step(Kind::kEmpty, 1, joined({&sizes, &strides}));
  step.dtype = dtype;
  return append(std::move(step));
}

int Program::view(const Given& base, const std::vector<Given>& sizes, const std::vector<Given>& strides,
                  const Given& offset) {
  Step step(Kind::kView, 1, joined({&sizes, &strides}));
  step.arguments.push_back(value_of(offset));
  step.arguments.push_back(tensor_of(base));
  return append(std::move(step));
}

int Program::expect(const Given& tensor, const std::vector<Given>& sizes, const std::vector<Given>& strides,
                    const std::string& made_by) {
  Step step(Kind::kExpect, 0, joined({&sizes, &strides}));
  step.arguments.push_back(tensor_of(tensor));
  step.message = made_by;
  return append(std::move(step));
}

int Program::launch(CompiledKernel kernel, const std::vector<Given>& grid, const std::vector<Given>& given) {
  TORCH_CHECK(grid.size() == 3 && given.size() == kernel.types.size(), "a kernel of ", kernel.types.size(),
              " parameters is given ", given.size());
  Step step(Kind::kLaunch, 0, joined({&grid}));
  for (size_t i = 0; i < given.size(); ++i) {
    bool is_number = kernel.types[i] != 'O' || given[i].kind == Argument::kNumber;
    step.arguments.push_back(is_number ? value_of(given[i]) : tensor_of(given[i]));
  }
  step.kernel = std::make_shared<const CompiledKernel>(std::move(kernel));
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

namespace {

const c10::IValue& read(const Argument& argument, const std::vector<c10::IValue>& slots) {
  return argument.kind == Argument::kConstant ? argument.constant : slots[static_cast<size_t>(argument.slot)];
}

int64_t integer(const Argument& argument, const std::vector<c10::IValue>& slots) {
  auto& value = read(argument, slots);
  if (value.isBool()) return value.toBool();
  if (!value.isInt()) throw Declined{};
  return value.toInt();
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
uint64_t bits_of_integer(int64_t value) {
  // A compiler has made sure that sizes fit; Python would raise where one does not.
  if (value < static_cast<int64_t>(std::numeric_limits<T>::min()) ||
      (sizeof(T) < sizeof value && value > static_cast<int64_t>(std::numeric_limits<T>::max())))
    throw Declined{};
  return bits_of(static_cast<T>(value));
}

// A kernel's parameter, in the first bytes.
uint64_t parameter(char type, const Argument& argument, const std::vector<c10::IValue>& slots) {
  auto& value = read(argument, slots);
  switch (type) {
    case 'O':
      if (argument.kind == Argument::kConstant && value.isNone()) return 0;
      return bits_of(value.toTensor().data_ptr());
    case 'f':
      return bits_of(value.isDouble() ? static_cast<float>(value.toDouble())
                                      : static_cast<float>(integer(argument, slots)));
    case 'd':
      return bits_of(value.isDouble() ? value.toDouble() : static_cast<double>(integer(argument, slots)));
    case 'i':
      return bits_of_integer<int32_t>(integer(argument, slots));
    case 'I':
      return bits_of_integer<uint32_t>(integer(argument, slots));
    case 'h':
      return bits_of_integer<int16_t>(integer(argument, slots));
    case 'H':
      return bits_of_integer<uint16_t>(integer(argument, slots));
    case 'b':
      return bits_of_integer<int8_t>(integer(argument, slots));
    case 'B':
      return bits_of_integer<uint8_t>(integer(argument, slots));
    case 'K':
      return bits_of_integer<uint64_t>(integer(argument, slots));
    default:
      return bits_of(integer(argument, slots));
  }
}

}  // namespace

// Steps that read their arguments where they lie.
void Program::compute_in_place(const Step& step, Slots& slots, const Queue& queue) const {
  auto* made = slots.data() + step.first;
  auto* given = step.arguments.data();
  auto numbers = [&](size_t first, size_t count) {
    Sizes all;
    for (size_t i = first; i < first + count; ++i) all.push_back(integer(given[i], slots));
    return all;
  };
  auto count = step.arguments.size();
  switch (step.kind) {
    case Kind::kEmpty:
      *made = new_tensor(numbers(0, count / 2), numbers(count / 2, count / 2), step.dtype, queue.device);
      break;
    case Kind::kView: {
      auto rank = (count - 2) / 2;
      *made = view_of(read(given[count - 1], slots).toTensor(), numbers(0, rank), numbers(rank, rank),
                      integer(given[count - 2], slots));
      break;
    }
    case Kind::kExpect: {
      auto rank = (count - 1) / 2;
      auto& x = read(given[count - 1], slots).toTensor();
      auto sizes = numbers(0, rank), strides = numbers(rank, rank);
      bool as_expected = x.sizes() == c10::IntArrayRef(sizes);
      for (size_t d = 0; as_expected && x.numel() && d < rank; ++d) {
        as_expected = sizes[d] == 1 || x.stride(static_cast<int64_t>(d)) == strides[d];
      }
      TORCH_CHECK(as_expected, step.message, " returned sizes ", x.sizes(), " and strides ", x.strides(), "; expected ",
                  c10::IntArrayRef(sizes), " and ", c10::IntArrayRef(strides),
                  ", as the compiler did. Compile with dynamic=False or with backend='eager'");
      break;
    }
    default: {
      auto& kernel = *step.kernel;
      TORCH_CHECK(queue.api && queue.api->launch_kernel, "this device launches no kernels");
      std::array<unsigned, 3> grid, block{kernel.threads, 1, 1};
      for (size_t i = 0; i < 3; ++i) {
        auto n = integer(given[i], slots);
        if (n < 0 || n > std::numeric_limits<int32_t>::max()) throw Declined{};
        grid[i] = static_cast<unsigned>(n);
      }
      if (!grid[0] || !grid[1] || !grid[2]) break;
      c10::SmallVector<uint64_t, 32> values;
      c10::SmallVector<void*, 32> pointers;
      for (size_t i = 0; i < kernel.types.size(); ++i)
        values.push_back(parameter(kernel.types[i], given[3 + i], slots));
      for (auto& value : values) pointers.push_back(&value);
      KernelLaunch launch{kernel.function,     nullptr,         nullptr, grid.data(), block.data(),
                          kernel.shared_bytes, pointers.data(), nullptr};
      if (int code = queue.api->launch_kernel(launch, queue.stream)) throw DeviceError("launching a kernel", code);
    }
  }
  for (auto& argument : step.arguments) {
    if (argument.is_last) slots[static_cast<size_t>(argument.slot)] = c10::IValue();
  }
}

void Program::execute(Slots& slots, const Queue& queue, Values& results) const {
  torch::jit::Stack stack;
  for (auto& step : steps_) {
    if (step.kind >= Kind::kEmpty) {
      compute_in_place(step, slots, queue);
      for (int slot : step.unused) slots[static_cast<size_t>(slot)] = c10::IValue();
      continue;
    }
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
        program.execute(inner, queue, returned);
        for (size_t i = 0; i < step.results; ++i) made[i] = std::move(returned[i]);
        break;
      }
      default:
        break;
    }
    for (int slot : step.unused) slots[static_cast<size_t>(slot)] = c10::IValue();
  }
  for (int slot : results_) {
    auto at = static_cast<size_t>(slot);
    results.push_back(at < weights_.size() ? c10::IValue(weights_[at]) : slots[at]);
  }
}

bool Program::run(const at::Tensor* inputs, size_t count, const Values& numbers, const Queue& queue,
                  Values& results) const {
  auto given = count + numbers.size();
  TORCH_CHECK(given == static_cast<size_t>(inputs_), "the program takes ", inputs_, " values, given ", given);
  Neutral neutral(queue.device.type());
  // Nothing here is recorded for a backward pass. What others register may rely on being asked all the same.
  std::optional<at::AutoDispatchBelowAutograd> below;
  if (only_aten_) below.emplace();
  Slots slots(static_cast<size_t>(slots_));
  auto rest = std::copy(inputs, inputs + count, slots.begin() + static_cast<int64_t>(weights_.size()));
  std::copy(numbers.begin(), numbers.end(), rest);
  try {
    execute(slots, queue, results);
  } catch (Declined&) {
    results.clear();
    return false;
  }
  return true;
}

}  // namespace anabranch::runtime
