#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <memory>
#include <vector>

#include "kernel.h"
#include "pool.h"

namespace anabranch::runtime {

// What a stream has used last: `done` is recorded behind it. `owner` keeps the event.
struct LastUse : Payload {
  std::shared_ptr<void> owner;
  c10::Event* done = nullptr;  // the owner's
};

// An execution context: the memory and the graph of one call in flight. `owner` keeps them, and when it is let go of
// sees to it that they are freed after `done`.
struct Context : LastUse {
  void* graph = nullptr;
  std::vector<at::Tensor> inputs;    // where the graph reads; undefined where it reads the caller's
  std::vector<const char*> results;  // where it writes each region; null where it writes the caller's
  std::vector<Kernel> kernels;       // those of its nodes that take addresses of the caller's
};

}  // namespace anabranch::runtime
