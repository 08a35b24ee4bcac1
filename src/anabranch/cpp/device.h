// Which devices engines in C++ run on.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include "../runtime/_core/device.h"

namespace anabranch {

// For the tests on the simulated device: what engines on PyTorch's PrivateUse1 device ask of it. Before the first
// engine.
void set_private_device(const runtime::DeviceApi* api);

// `device` with its index. Throws InputError where engines cannot run on it.
c10::Device checked(c10::Device device);

// Null: it has no streams.
const runtime::DeviceApi* api_of(c10::Device device);

// A stream that nobody queues anything on but engines that go. One for each device, made with its first engine (a
// destructor had better not) and never destroyed.
//
// PyTorch's pool would do in the order of things, but its streams are lent to other code, whose work would wait for our
// last uses, and where one is under capture a wait for an event from outside breaks the capture.
c10::Stream retiring_stream(c10::Device device, const runtime::DeviceApi& api);

}  // namespace anabranch
