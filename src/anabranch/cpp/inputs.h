#pragma once

#include "../runtime/_core/input.h"
#include "anabranch/engine.h"

namespace anabranch {

// As the runtime compares them with a call's; contiguous ones lose their strides. Throws InputError.
std::vector<runtime::InputSpec> specs_of(std::vector<Input>& inputs);

// Throws what is wrong with input `i`, if anything is.
void check(const at::Tensor& x, size_t i, const Input& expected, c10::Device device);

}  // namespace anabranch
