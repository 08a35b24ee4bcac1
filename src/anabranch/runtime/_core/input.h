#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

namespace anabranch::runtime {

// Whether it is an ordinary dense tensor: its bytes are its values, it is no other tensor's stand-in (of vmap, say),
// and nothing is attached to it that a call would lose.
bool is_plain(const at::Tensor& x);

// Shape, strides and dtype of an input as the kernels see it.
struct InputSpec {
  // Of inputs like `x`.
  explicit InputSpec(const at::Tensor& x);

  c10::SmallVector<int64_t, 5> sizes, strides;
  at::ScalarType dtype;
  bool contiguous;
  size_t bytes;

  // Whether a call with `x` is one of this signature; says no where it takes a closer look to tell.
  bool accepts(const at::Tensor& x) const;
  // Whether the kernels can read `x` as it is: same strides where they matter, and aligned.
  bool matches(const at::Tensor& x, size_t alignment) const;
};

}  // namespace anabranch::runtime
