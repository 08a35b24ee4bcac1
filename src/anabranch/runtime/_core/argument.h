// Arguments of a program's steps, for whoever makes programs: Python, or a file that C++ reads.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <optional>
#include <vector>

namespace anabranch::runtime {

struct Argument {
  // A value that an earlier step left in a slot; a number from there; a list; a constant.
  enum Kind { kSlot, kNumber, kList, kConstant } kind = kConstant;
  int slot = -1;
  bool is_last = false;                              // nothing needs the slot afterwards
  c10::TypeKind wanted = c10::TypeKind::NumberType;  // of a number: what the operator takes
  std::vector<Argument> items;                       // of a list; its constants may be None
  c10::TypePtr element;                              // of a list
  c10::IValue constant;
};

// An argument before it is known what takes it.
struct Given {
  Argument::Kind kind = Argument::kConstant;
  int slot = -1;
  bool is_tensor = false;  // what lies in the slot, for sure
  std::vector<Given> items;
  std::optional<c10::IValue> number;  // a constant that is one
  // Any other constant, as a value of `type`: one number stands for a list of `length`. Throws where it is none.
  std::function<c10::IValue(const c10::TypePtr& type, std::optional<int32_t> length)> constant;
};

// What is given for an operator as its schema declares it, and the schema's defaults for what is not. Throws
// c10::Error.
std::vector<Argument> arguments_of(const c10::FunctionSchema& schema, const std::vector<Given>& given);

// The same for what is no operator: values as they are.
Argument value_of(const Given& given);
std::vector<Argument> values_of(const std::vector<Given>& given);

}  // namespace anabranch::runtime
