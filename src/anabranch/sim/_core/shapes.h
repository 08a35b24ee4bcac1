// What operators do that PyTorch's meta kernels and schemas do not say.
#pragma once

#include <ATen/core/operator_name.h>
#include <ATen/core/stack.h>

#include <optional>
#include <string>

#include "ops.h"

namespace anabranch::sim {

// Arguments on meta to returns on meta; null where PyTorch has a meta kernel, or nobody has.
using ShapeRule = torch::jit::Stack (*)(const torch::jit::Stack& args);
ShapeRule shape_rule(const c10::OperatorName& op);

// Whether an operator writes an argument, where the schema does not have it right; nothing where it does.
std::optional<bool> writes_by_rule(const std::string& op, const torch::jit::Stack& args, size_t argument);

}  // namespace anabranch::sim
