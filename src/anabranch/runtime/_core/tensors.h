// New tensors and views for a program's steps, without the dispatcher: a call makes about a hundred of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/SmallVector.h>

namespace anabranch::runtime {

using Sizes = c10::SmallVector<int64_t, 6>;

// On the current stream of `device`, which is the current device. Strides and sizes are in elements.
at::Tensor new_tensor(const Sizes& sizes, const Sizes& strides, at::ScalarType dtype, c10::Device device);

// The memory of `base`, `offset` elements after its beginning.
at::Tensor view_of(const at::Tensor& base, const Sizes& sizes, const Sizes& strides, int64_t offset);

}  // namespace anabranch::runtime
