// Shapes of operators without a meta kernel, what schemas keep quiet about, and fused operators that exist for CUDA
// only and are put together here.
#include "shapes.h"

#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include <map>

namespace anabranch::sim {
namespace {

using torch::jit::Stack;
using Optional = const std::optional<at::Tensor>&;

Stack like_first(const Stack& args) {
  return {at::empty_like(args[0].toTensor(), at::MemoryFormat::Contiguous)};
}

Stack attention(const Stack& args) {
  auto& query = args[0].toTensor();
  at::Tensor weights;
  if (args[10].toBool()) {  // need_weights
    auto from = args[1].toTensor().size(1);
    weights = args[11].toBool() ? at::empty({query.size(0), query.size(1), from}, query.options())
                                : at::empty({query.size(0), args[4].toInt(), query.size(1), from}, query.options());
  }
  return {at::empty({query.size(0), query.size(1), args[3].toInt()}, query.options()), weights};
}

Stack rescaled_qkv(const Stack& args) {
  auto& qkv = args[0].toTensor();
  auto heads = args[2].toInt();
  auto one = at::empty({qkv.size(0), heads, qkv.size(1), qkv.size(2) / 3 / heads}, qkv.options());
  return {one, at::empty_like(one), at::empty_like(one)};
}

Stack least_and_greatest(const Stack& args) {
  auto one = at::empty({}, args[0].toTensor().options());
  return {one, at::empty_like(one)};
}

Stack least_and_greatest_along(const Stack& args) {
  auto& self = args[0].toTensor();
  auto sizes = self.sizes().vec();
  auto dim = at::maybe_wrap_dim(args[1].toInt(), self.dim());
  if (!sizes.empty()) {
    if (args[2].toBool())
      sizes[static_cast<size_t>(dim)] = 1;
    else
      sizes.erase(sizes.begin() + dim);
  }
  auto one = at::empty(sizes, self.options());
  return {one, at::empty_like(one)};
}

// PyTorch's meta kernel has the shapes of CUDA. The map from indices to bags is left out: a backward that needs it then
// makes it itself.
Stack bags(const Stack& args) {
  auto &weight = args[0].toTensor(), &indices = args[1].toTensor(), &offsets = args[2].toTensor();
  auto count = offsets.size(0) - (args[7].toBool() ? 1 : 0);
  auto none = at::empty({0}, indices.options());
  constexpr int64_t kMax = 2;
  return {at::empty({count, weight.size(1)}, weight.options()), none, at::empty_like(offsets),
          args[4].toInt() == kMax ? at::empty({count, weight.size(1)}, indices.options()) : at::empty_like(none)};
}

const std::map<std::string, ShapeRule> kRules{
    {"aten::_embedding_bag", &bags},
    {"aten::_embedding_bag_forward_only", &bags},
    {"aten::_transformer_encoder_layer_fwd", &like_first},
    {"aten::_native_multi_head_attention", &attention},
    {"aten::_transform_bias_rescale_qkv", &rescaled_qkv},
    {"aten::_masked_softmax", &like_first},
    {"aten::_masked_softmax_backward", &like_first},
    {"aten::_logcumsumexp", &like_first},
    {"aten::binomial", &like_first},
    {"aten::_standard_gamma_grad", &like_first},
    {"aten::_sample_dirichlet", &like_first},
    {"aten::_dirichlet_grad", &like_first},
    {"aten::glu_backward_jvp", &like_first},
    {"aten::_aminmax", &least_and_greatest},
    {"aten::_aminmax.dim", &least_and_greatest_along},
};

// -- fused cells ---------------------------------------------------------------------------------------------------

at::Tensor gates(const at::Tensor& inputs, const at::Tensor& hiddens, Optional input_bias, Optional hidden_bias) {
  auto sum = inputs + hiddens;
  if (input_bias && input_bias->defined()) sum += *input_bias;
  if (hidden_bias && hidden_bias->defined()) sum += *hidden_bias;
  return sum;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& inputs, const at::Tensor& hiddens,
                                                         const at::Tensor& cx, Optional input_bias,
                                                         Optional hidden_bias) {
  auto parts = gates(inputs, hiddens, input_bias, hidden_bias).chunk(4, 1);
  auto i = parts[0].sigmoid(), f = parts[1].sigmoid(), g = parts[2].tanh(), o = parts[3].sigmoid();
  auto cy = at::addcmul(f * cx, i, g);
  return {o * cy.tanh(), cy, at::cat(at::TensorList({i, f, g, o}), 1)};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& inputs, const at::Tensor& hiddens, const at::Tensor& hx,
                                            Optional input_bias, Optional hidden_bias) {
  auto in = (input_bias && input_bias->defined() ? inputs + *input_bias : inputs).chunk(3, 1);
  auto hid = (hidden_bias && hidden_bias->defined() ? hiddens + *hidden_bias : hiddens).chunk(3, 1);
  auto r = (in[0] + hid[0]).sigmoid(), z = (in[1] + hid[1]).sigmoid();
  auto n = at::addcmul(in[2], r, hid[2]).tanh();
  return {at::addcmul(n, z, hx - n), at::cat(at::TensorList({r, z, n, hx, hid[2]}), 1)};
}

// -- convolution, by the name that other backends know it ------------------------------------------------------------

using Ints = c10::IntArrayRef;

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, Optional bias, Ints stride, Ints padding,
                       Ints dilation, bool transposed, Ints output_padding, int64_t groups) {
  return at::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                                                                    const at::Tensor& weight, Ints stride, Ints padding,
                                                                    Ints dilation, bool transposed, Ints output_padding,
                                                                    int64_t groups, std::array<bool, 3> mask) {
  int64_t bias = transposed ? weight.size(1) * groups : weight.size(0);
  return at::convolution_backward(grad, input, weight, Ints(bias), stride, padding, dilation, transposed,
                                  output_padding, groups, mask);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

ShapeRule shape_rule(const c10::OperatorName& op) {
  auto found = kRules.find(op.overload_name.empty() ? op.name : op.name + "." + op.overload_name);
  return found == kRules.end() ? nullptr : found->second;
}

std::optional<bool> writes_by_rule(const std::string& op, const Stack& args, size_t argument) {
  // The running statistics: written without a word in the schema, or announced and only read.
  bool statistics = argument == 3 || argument == 4;
  if (statistics && (op == "aten::native_batch_norm" || op == "aten::_native_batch_norm_legit"))
    return args[5].toBool();
  if (op == "aten::batch_norm_update_stats" && (argument == 1 || argument == 2)) return true;
  return std::nullopt;
}

}  // namespace anabranch::sim
