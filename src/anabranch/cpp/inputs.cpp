#include "inputs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <sstream>

#include "file.h"

namespace anabranch {

namespace {

std::string str(c10::IntArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  out << (numbers.empty() ? "[]" : "]");
  return out.str();
}

}  // namespace

std::string Input::str() const {
  return dtype_name(dtype) + anabranch::str(sizes) + (strides.empty() ? "" : " strides " + anabranch::str(strides));
}

std::vector<runtime::InputSpec> specs_of(std::vector<Input>& inputs, const std::vector<State>& state) {
  std::vector<runtime::InputSpec> all;
  for (auto& input : inputs) {
    for (auto n : input.sizes) {
      if (n < 0) throw InputError("sizes " + str(input.sizes) + " of an input given; each must be 0 or more");
    }
    auto options = at::TensorOptions().dtype(input.dtype).device(c10::kMeta);
    auto rank = input.strides.size();
    if (rank && rank != input.sizes.size()) {
      throw InputError(std::to_string(rank) + " strides of an input given, and " + std::to_string(input.sizes.size()) +
                       " sizes; give as many, or none");
    }
    at::Tensor like = rank ? at::empty_strided(input.sizes, input.strides, options) : at::empty(input.sizes, options);
    if (like.is_contiguous()) input.strides.clear();
    all.emplace_back(like);
    all.back().written = input.written;
  }
  for (auto& kept : state) {
    all.emplace_back(kept.initial);
    all.back().written = kept.written;
    all.back().owned = true;
  }
  return all;
}

void check(const at::Tensor& x, size_t i, const Input& expected, c10::Device device) {
  auto name = "input " + std::to_string(i);
  if (!x.defined()) throw InputError(name + " is undefined; expected " + expected.str() + ". Pass a tensor.");
  if (x.device() != device) {
    throw InputError(name + " is on " + x.device().str() + "; this engine runs on " + device.str() + ". Pass x.to(\"" +
                     device.str() + "\"), or load another engine there.");
  }
  if (x.layout() != c10::kStrided) {
    std::ostringstream layout;
    layout << x.layout();
    throw InputError(name + " has layout " + layout.str() + "; expected Strided. Pass x.to_dense().");
  }
  if (x.is_conj() || x.is_neg() || x._is_zerotensor()) {
    throw InputError(name +
                     " is a lazy conjugate, negative or zero; expected its values in memory. Pass"
                     " x.resolve_conj().resolve_neg().");
  }
  if (!runtime::is_plain(x)) {
    throw InputError(name +
                     " stands in for another tensor, or is of another kind; expected a plain one with memory. Pass"
                     " x.clone(), outside of any torch.func transform.");
  }
  if (x.scalar_type() != expected.dtype || x.sizes() != c10::IntArrayRef(expected.sizes)) {
    Input given{x.scalar_type(), x.sizes().vec(), {}};
    throw InputError(name + " is " + given.str() + "; this engine takes " + expected.str() +
                     ". Pass such a tensor, or save a program for yours.");
  }
}

void check_written(at::ArrayRef<at::Tensor> given, size_t i) {
  auto& x = given[i];
  auto name = "input " + std::to_string(i);
  for (size_t j = 0; j < given.size(); ++j) {
    if (j == i || !runtime::may_share(x, given[j])) continue;
    throw InputError(name + " and input " + std::to_string(j) + " share memory, and the model writes into " + name +
                     ". Pass tensors with memory of their own.");
  }
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) < 2 || x.stride(d)) continue;
    throw InputError(name +
                     " is expanded: one place in its memory stands for several elements, and the model writes into it."
                     " Pass x.contiguous().");
  }
}

}  // namespace anabranch
