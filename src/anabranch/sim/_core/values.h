// Tensors inside an operator's arguments and returns.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <vector>

namespace anabranch::sim {

// `value` with `f` applied to every tensor in it.
template <class F>
c10::IValue mapped(const c10::IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> all;
    for (const at::Tensor& t : value.toTensorList()) all.push_back(f(t));
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> all;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      all.push_back(t && t->defined() ? std::optional<at::Tensor>(f(*t)) : t);
    }
    return all;
  }
  return value;
}

template <class F>
void each(const c10::IValue& value, const F& f) {
  mapped(value, [&](const at::Tensor& t) {
    if (t.defined()) f(t);
    return t;
  });
}

// Tensors of `value` beside those that were made of them, in the same order.
inline void each_pair(const c10::IValue& value, const c10::IValue& made,
                      const std::function<void(const at::Tensor&, const at::Tensor&)>& f) {
  std::vector<at::Tensor> twins;
  mapped(made, [&](const at::Tensor& t) { return twins.push_back(t), t; });
  size_t i = 0;
  mapped(value, [&](const at::Tensor& t) {
    auto& twin = twins[i++];
    if (t.defined()) f(t, twin);
    return t;
  });
}

}  // namespace anabranch::sim
