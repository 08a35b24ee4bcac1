// Graph launches as the bindings and the native runtime make them.
#pragma once

#include "threads.h"

namespace anabranch::sim {

void launch_graph(int64_t graph, const QueuePtr& queue);
// The address of the machine's anabranch::runtime::DeviceApi.
uintptr_t native_api();

}  // namespace anabranch::sim
