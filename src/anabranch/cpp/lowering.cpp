#include "lowering.h"

namespace anabranch {

namespace {

// The first line of what PyTorch has to say.
std::string first_line(const std::exception& error) {
  auto* torch = dynamic_cast<const c10::Error*>(&error);
  std::string all = torch ? torch->what_without_backtrace() : error.what();
  return all.substr(0, all.find('\n'));
}

template <class T, class Convert>
c10::IValue list_of(const c10::IValue& value, Convert convert) {
  c10::List<T> list;
  for (auto& v : value.isTuple() ? value.toTupleRef().elements().vec() : value.toListRef().vec()) {
    list.push_back(convert(v));
  }
  return list;
}

int64_t integer(const c10::IValue& v) {
  return v.isBool() ? v.toBool() : v.toInt();
}

double real(const c10::IValue& v) {
  return v.isDouble() ? v.toDouble() : static_cast<double>(integer(v));
}

// A constant as the schema wants it: the unpickler makes lists of anything, and 2 where 2.0 is meant.
c10::IValue conform(const c10::IValue& value, const c10::TypePtr& type, std::optional<int32_t> length) {
  if (auto optional = type->cast<c10::OptionalType>()) {
    return value.isNone() ? value : conform(value, optional->getElementType(), length);
  }
  switch (type->kind()) {
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return integer(value);
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return real(value);
    case c10::TypeKind::BoolType:
    case c10::TypeKind::SymBoolType:
      return value.toBool();
    case c10::TypeKind::NumberType:
      if (value.isScalar()) return value;
      break;
    case c10::TypeKind::StringType:
      return value.toStringRef();
    case c10::TypeKind::DeviceObjType:
      return value.toDevice();
    case c10::TypeKind::ListType: {
      auto element = type->expectRef<c10::ListType>().getElementType()->kind();
      if (!value.isList() && !value.isTuple()) {
        // One number stands for a list of a fixed length.
        if (!length || !value.isScalar()) break;
        if (element == c10::TypeKind::FloatType) return c10::List<double>(std::vector<double>(*length, real(value)));
        return c10::List<int64_t>(std::vector<int64_t>(static_cast<size_t>(*length), integer(value)));
      }
      switch (element) {
        case c10::TypeKind::IntType:
        case c10::TypeKind::SymIntType:
          return list_of<int64_t>(value, integer);
        case c10::TypeKind::FloatType:
          return list_of<double>(value, real);
        case c10::TypeKind::BoolType:
          return list_of<bool>(value, [](auto& v) { return v.toBool(); });
        case c10::TypeKind::StringType:
          return list_of<std::string>(value, [](auto& v) { return v.toStringRef(); });
        case c10::TypeKind::NumberType:
          return list_of<c10::Scalar>(value, [](auto& v) { return v.toScalar(); });
        case c10::TypeKind::TensorType:
          return list_of<at::Tensor>(value, [](auto& v) { return v.toTensor(); });
        default:
          break;
      }
      break;
    }
    default:
      break;
  }
  throw InputError("a constant " + value.tagKind() + " is given where the schema says " + type->str());
}

class Lowering {
 public:
  Lowering(const std::vector<at::Tensor>& weights, const std::vector<runtime::InputSpec>& given)
      : weights_(weights.size()), given_(given), made_(weights, static_cast<int>(given.size())) {}

  void append(const Step& step) {
    auto& from = step.arguments;
    if (!step.name.empty()) {
      std::vector<runtime::Given> all;
      for (auto& argument : from) all.push_back(given(argument));
      made_.call(step.name, step.overload, all);
      check_writes(step);
      return;
    }
    if (from.size() != 2 || from[0].kind != Argument::kValue || !from[1].data.isInt()) {
      throw InputError("a step without a name takes the slot of a list and a number");
    }
    made_.pick(checked(from[0].slots.at(0)), static_cast<int>(from[1].data.toInt()));
  }

  // `slot`, if something lies there.
  int checked(int64_t slot) const {
    if (slot >= 0 && slot < made_.slots()) return static_cast<int>(slot);
    throw InputError("slot " + std::to_string(slot) + " given, and so far there are " + std::to_string(made_.slots()));
  }

  std::shared_ptr<const runtime::Program> finish(std::vector<int> results) {
    made_.finish(std::move(results));
    return std::make_shared<const runtime::Program>(std::move(made_));
  }

 private:
  // What calls share, and inputs that the caller does not expect to change, may not be written.
  void check_writes(const Step& step) const {
    auto op = c10::Dispatcher::singleton().findSchema({step.name, step.overload});
    if (!op) return;
    auto& declared = op->schema().arguments();
    for (size_t i = 0; i < step.arguments.size() && i < declared.size(); ++i) {
      if (!declared[i].alias_info() || !declared[i].alias_info()->isWrite()) continue;
      for (auto slot : step.arguments[i].slots) {
        auto at = static_cast<size_t>(slot);
        if (slot < 0 || at >= weights_ + given_.size() || (at >= weights_ && given_[at - weights_].written)) continue;
        throw InputError("it writes into slot " + std::to_string(slot) + ", which is not said to be written");
      }
    }
  }

  // While `from` lives.
  runtime::Given given(const Argument& from) const {
    runtime::Given made;
    switch (from.kind) {
      case Argument::kValue:
        made.kind = runtime::Argument::kSlot;
        made.slot = checked(from.slots.at(0));
        break;
      case Argument::kValues:
        made.kind = runtime::Argument::kList;
        for (auto slot : from.slots) made.items.push_back(slot == -1 ? none() : given(Argument::value(slot)));
        break;
      case Argument::kConstant:
        if (from.data.isScalar()) made.number = from.data;
        made.constant = [&from](auto& type, auto length) { return conform(from.data, type, length); };
        break;
    }
    return made;
  }

  // -1 in a list: none, where it is one of optional tensors.
  runtime::Given none() const {
    runtime::Given made;
    made.constant = [this](auto& type, auto) {
      if (type->kind() != c10::TypeKind::OptionalType) checked(-1);
      return c10::IValue();
    };
    return made;
  }

  size_t weights_;
  const std::vector<runtime::InputSpec>& given_;
  runtime::Program made_;
};

}  // namespace

Lowered lower(const Program& program, const std::vector<at::Tensor>& weights,
              const std::vector<runtime::InputSpec>& specs) {
  Lowering lowering(weights, specs);
  for (size_t i = 0; i < program.steps.size(); ++i) {
    auto& step = program.steps[i];
    try {
      lowering.append(step);
    } catch (std::exception& e) {
      throw InputError("step " + std::to_string(i) + " of the program (" + (step.name.empty() ? "pick" : step.name) +
                       (step.overload.empty() ? "" : "." + step.overload) + "): " + first_line(e) +
                       ". Give each step what the operator's schema says.");
    }
  }
  auto given = weights.size() + specs.size();
  Lowered made;
  std::vector<int> computed;
  for (auto slot : program.results) {
    if (auto at = static_cast<size_t>(lowering.checked(slot));
        at >= weights.size() && at < given && specs[at - weights.size()].owned) {
      throw InputError("slot " + std::to_string(slot) +
                       " is a result, and it is state, which the next call changes. Return a copy of it.");
    }
    bool is_given = static_cast<size_t>(lowering.checked(slot)) < given;
    made.outputs.push_back(is_given ? slot : static_cast<int64_t>(given + computed.size()));
    if (!is_given) computed.push_back(static_cast<int>(slot));
  }
  made.program = lowering.finish(std::move(computed));
  return made;
}

}  // namespace anabranch
