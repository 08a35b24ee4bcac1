// Not part of the public face: for the tests on the simulated device.
#pragma once

#include "../runtime/_core/device.h"
#include "anabranch/engine.h"

namespace anabranch {

// What engines on PyTorch's PrivateUse1 device ask of it. Before the first engine.
void set_private_device(const runtime::DeviceApi* api);

struct Tests {
  static const std::vector<at::Tensor>& weights(const Engine& engine);
};

}  // namespace anabranch
