#include "argument.h"

#include "numbers.h"

namespace anabranch::runtime {

namespace {

const c10::TypePtr& without_optional(const c10::TypePtr& type) {
  return type->kind() == c10::TypeKind::OptionalType ? type->expectRef<c10::OptionalType>().getElementType() : type;
}

// `type`: of `declared`, or of what is in the list that it is.
Argument argument_of(const c10::Argument& declared, const c10::TypePtr& type, const Given& given) {
  using Type = c10::TypeKind;
  auto& plain = without_optional(type);
  auto wanted = plain->kind();
  Argument argument;
  argument.kind = given.kind;
  switch (given.kind) {
    case Argument::kSlot:
    case Argument::kNumber: {
      bool is_number = given.kind == Argument::kNumber;
      bool fits = wanted == Type::TensorType || (is_number ? wanted == Type::IntType || wanted == Type::FloatType ||
                                                                 wanted == Type::BoolType || wanted == Type::NumberType
                                                           : !given.is_tensor);
      TORCH_CHECK_TYPE(fits, "argument ", declared.name(), " is a ", plain->str(), ", given a ",
                       is_number ? "number" : "tensor", " that is computed");
      argument.slot = given.slot;
      argument.wanted = wanted;
      break;
    }
    case Argument::kList:
      TORCH_CHECK_TYPE(wanted == Type::ListType, "a list is given for ", declared.name(), ", which is a ",
                       plain->str());
      argument.element = plain->expectRef<c10::ListType>().getElementType();
      for (auto& item : given.items) argument.items.push_back(argument_of(declared, argument.element, item));
      break;
    case Argument::kConstant:
      // A number beside a tensor, as in `x * 2`: it has no say in the result's dtype.
      argument.constant = given.number && wanted == Type::TensorType ? converted(*given.number, wanted)
                                                                     : given.constant(type, declared.N());
      break;
  }
  return argument;
}

}  // namespace

std::vector<Argument> arguments_of(const c10::FunctionSchema& schema, const std::vector<Given>& given) {
  auto& declared = schema.arguments();
  TORCH_CHECK(given.size() <= declared.size(), given.size(), " arguments given, the schema has ", declared.size());
  std::vector<Argument> all;
  for (size_t i = 0; i < declared.size(); ++i) {
    if (i < given.size()) {
      all.push_back(argument_of(declared[i], declared[i].type(), given[i]));
      continue;
    }
    TORCH_CHECK(declared[i].default_value(), "no ", declared[i].name(), " given, which has no default");
    all.emplace_back().constant = *declared[i].default_value();
  }
  return all;
}

Argument value_of(const Given& given) {
  Argument argument;
  argument.kind = given.kind;
  argument.slot = given.slot;
  if (given.kind == Argument::kSlot || given.kind == Argument::kNumber) return argument;
  TORCH_CHECK_TYPE(given.number, "expected a value from a slot, or a number");
  argument.constant = *given.number;
  return argument;
}

std::vector<Argument> values_of(const std::vector<Given>& given) {
  std::vector<Argument> all;
  for (auto& x : given) all.push_back(value_of(x));
  return all;
}

}  // namespace anabranch::runtime
