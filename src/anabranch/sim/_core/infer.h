// What an operator returns, without running it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

namespace anabranch::sim {

// "sim cannot simulate ...": NotImplementedError.
[[noreturn]] void refuse(const c10::OperatorHandle& op, const std::string& why);

// The sim devices in an argument as devices of `type`.
c10::IValue elsewhere(const c10::IValue& arg, c10::DeviceType type);

// Read only: it may be shared.
struct Inferred {
  torch::jit::Stack returns, args;  // on meta, as the operator left them
};

// Runs the meta kernel. Its complaints about the arguments come through. `in_place`: the operator returns arguments
// alone, with the shapes that they have.
Inferred infer(const c10::OperatorHandle& op, const torch::jit::Stack& args, bool in_place);

}  // namespace anabranch::sim
