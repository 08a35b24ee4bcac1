// The C++ of docs/cpp.md, compiled with engine_module.cpp. tests/unit/test_docs.py compares the two.
#pragma once

#include "anabranch/engine.h"

namespace documented {

inline std::vector<at::Tensor> from_a_file(const at::Tensor& x) {
  auto engine = anabranch::Engine::load("model.program", c10::Device("cuda"));
  std::vector<at::Tensor> results = engine.run({x});
  return results;
}

inline std::vector<at::Tensor> in_a_session(const at::Tensor& x) {
  auto engine = anabranch::Engine::load("decoder.program", c10::Device("cuda"));
  auto session = engine.session();
  auto y = session.run({x});
  auto kept = session.state();
  auto other = session.clone();
  session.reset();
  session.load(kept);
  return y;
}

inline std::vector<at::Tensor> without_a_file(const at::Tensor& weight, const at::Tensor& x) {
  // clang-format off
using anabranch::Argument;
anabranch::Program program{{{"aten::linear", "", {Argument::value(1), Argument::value(0)}},
                            {"aten::gelu", "", {Argument::value(2), Argument::constant("tanh")}}},
                           {3}};
anabranch::Engine engine(program, {weight}, {{at::kFloat, {8, 64}}}, weight.device());
  // clang-format on
  return engine.run({x});
}

}  // namespace documented
