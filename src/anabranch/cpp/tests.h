// Not part of the public face: what tests look into an engine for.
#pragma once

#include "anabranch/engine.h"

namespace anabranch {

struct Tests {
  static const std::vector<at::Tensor>& weights(const Engine& engine);
};

}  // namespace anabranch
