// What an engine's handles share.
#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

#include "../runtime/_core/specialization.h"
#include "anabranch/engine.h"

namespace anabranch {

struct Engine::Impl {
  Impl(const Program& program, std::vector<at::Tensor> given_weights, std::vector<Input> given, c10::Device device,
       const runtime::DeviceApi* api, std::vector<State> given_state);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // One call, on `own`, the tensors of a session, whose order it keeps.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> given, at::ArrayRef<at::Tensor> own,
                              runtime::SessionOrder* session);
  // Throws NotCapturable where the thread's current stream is under capture. The engine's device is the current one.
  void refuse_capture() const;

  std::vector<Input> inputs;
  std::vector<State> state;
  std::vector<at::Tensor> weights;
  runtime::Limits limits{0, -1};
  runtime::Counters counters;
  runtime::Specialization spec;
  c10::impl::VirtualGuardImpl guard;
  const runtime::DeviceApi* const api;  // null where the device has no streams
  std::vector<int64_t> outputs;         // see Lowered
  std::optional<c10::Stream> retiring;

 private:
  void check_all(at::ArrayRef<at::Tensor> given) const;
  runtime::Tensors writable(at::ArrayRef<at::Tensor> given, runtime::Tensors& targets) const;
};

}  // namespace anabranch
