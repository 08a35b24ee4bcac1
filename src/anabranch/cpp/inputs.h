#pragma once

#include "../runtime/_core/input.h"
#include "anabranch/engine.h"

namespace anabranch {

// As the runtime compares them with a call's; contiguous ones lose their strides. Those of a session's tensors come
// after them. Throws InputError.
std::vector<runtime::InputSpec> specs_of(std::vector<Input>& inputs, const std::vector<State>& state);

// Throws what is wrong with input `i`, if anything is.
void check(const at::Tensor& x, size_t i, const Input& expected, c10::Device device);

// Throws where eager would not write into input `i`, or where another input would change.
void check_written(at::ArrayRef<at::Tensor> given, size_t i);

}  // namespace anabranch
