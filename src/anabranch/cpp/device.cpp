#include "device.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <optional>
#include <unordered_map>

#include "anabranch/engine.h"

namespace anabranch {

namespace {

// Of devices that this file does not know. Written before the first engine.
const runtime::DeviceApi* other_api = nullptr;

}  // namespace

void set_private_device(const runtime::DeviceApi* api) {
  other_api = api;
}

c10::Device checked(c10::Device device) {
  auto given = "device " + device.str() + " given";
  if (device.is_cpu()) return c10::Device(c10::kCPU);
  if (!device.is_cuda() && !(device.is_privateuseone() && other_api)) {
    throw InputError(given + "; engines in C++ run on cpu and cuda, give one of these");
  }
  auto* guard = c10::impl::hasDeviceGuardImpl(device.type()) ? c10::impl::getDeviceGuardImpl(device.type()) : nullptr;
  if (!guard) {
    throw InputError(given +
                     ", and the PyTorch in this process has no CUDA. Link one that has, with -Wl,--no-as-needed"
                     " ahead of -ltorch (see anabranch.cpp.link_flags()), or give cpu.");
  }
  auto count = guard->deviceCount();
  if (device.index() >= count || !count) {
    throw InputError(given + ", and there are " + std::to_string(count) + " such devices; give one of them, or cpu");
  }
  return device.has_index() ? device : guard->getDevice();
}

const runtime::DeviceApi* api_of(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  if (!device.is_cuda()) return other_api;
  try {
    return &runtime::cuda_api();
  } catch (std::runtime_error& e) {
    throw Error(e.what());
  }
}

c10::Stream retiring_stream(c10::Device device, const runtime::DeviceApi& api) {
  static std::mutex lock;
  static auto& made = *new std::unordered_map<c10::DeviceIndex, c10::Stream>;
  std::lock_guard<std::mutex> guard(lock);
  auto found = made.find(device.index());
  if (found != made.end()) return found->second;
  c10::impl::VirtualGuardImpl impl(device.type());
  c10::DeviceGuard on(device);
  std::optional<c10::Stream> stream;
  if (api.new_stream) {
    runtime::StreamRef ref{nullptr, 0, device.index()};
    if (int code = api.new_stream(&ref)) throw DeviceError("making a stream failed with code " + std::to_string(code));
    stream.emplace(c10::Stream::UNSAFE, device, ref.id);
    if (impl.getStreamNativeHandle(*stream) != ref.handle) stream.reset();  // this PyTorch numbers them otherwise
  }
  if (!stream) stream = impl.getNewStream(device);
  return made.emplace(device.index(), *stream).first->second;
}

}  // namespace anabranch
