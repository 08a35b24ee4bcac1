// Inline throughout: each call asks about each of its inputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <utility>

namespace anabranch::runtime {

// Whether it is an ordinary dense tensor: its bytes are its values, it is no other tensor's stand-in (of vmap, say),
// and nothing is attached to it that a call would lose.
inline bool is_plain(const at::Tensor& x) {
  using Key = c10::DispatchKey;
  constexpr auto ordinary =
      c10::DispatchKeySet({Key::Dense, Key::AutogradFunctionality, Key::AutogradOther, Key::ADInplaceOrView}) |
      c10::autocast_dispatch_keyset;
  auto* impl = x.unsafeGetTensorImpl();
  auto odd = (impl->key_set() - ordinary).raw_repr() & ~c10::full_backend_mask;
  return !odd && x.has_storage() && !x._fw_grad(0).defined();
}

// Shape, strides and dtype of an input as the kernels see it.
struct InputSpec {
  // Of any tensor: its sizes depend on data, and operators take it as it is.
  InputSpec() : contiguous(false), open(true), bytes(0) {}

  // Of inputs like `x`.
  explicit InputSpec(const at::Tensor& x)
      : sizes(x.sizes().begin(), x.sizes().end()),
        strides(x.strides().begin(), x.strides().end()),
        dtype(x.scalar_type()),
        contiguous(x.is_contiguous()),
        bytes(static_cast<size_t>(x.numel()) * x.element_size()) {}

  c10::SmallVector<int64_t, 5> sizes, strides;
  at::ScalarType dtype = at::ScalarType::Undefined;
  bool contiguous;
  bool open = false;
  bool written = false;  // the program writes into it
  bool owned = false;    // it is a session's, which nobody else has
  size_t bytes;

  // Whether a call with `x` is one of this signature; says no where it takes a closer look to tell.
  bool accepts(const at::Tensor& x) const {
    // First of all: a nested tensor has no sizes to ask for.
    if (open || !is_plain(x) || x.dtype() != caffe2::TypeMeta::fromScalarType(dtype)) return false;
    if (x.sizes() != c10::IntArrayRef(sizes)) return false;
    if (contiguous) return x.is_contiguous();
    return !x.is_contiguous() && x.strides() == c10::IntArrayRef(strides);
  }

  // Whether the kernels can read `x` as it is: same strides where they matter, and aligned.
  bool matches(const at::Tensor& x, size_t alignment) const {
    if (open || !x.numel()) return true;
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignment) return false;
    return contiguous ? x.is_contiguous() : x.strides() == c10::IntArrayRef(strides);
  }
};

// The bytes that lie between the first and the last element of `x`.
inline std::pair<uintptr_t, uintptr_t> span_of(const at::Tensor& x) {
  auto start = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  if (!x.numel()) return {start, start};
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return {start, start + static_cast<uintptr_t>(last + 1) * x.element_size()};
}

// Whether two tensors may have bytes in common.
inline bool may_share(const at::Tensor& x, const at::Tensor& y) {
  auto [start, stop] = span_of(x);
  auto [first, last] = span_of(y);
  return x.numel() && y.numel() && start < last && first < stop;
}

}  // namespace anabranch::runtime
