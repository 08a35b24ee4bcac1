// Copies, by CUDA's rules for who waits for whom:
// - on one device: queued on its current stream;
// - between devices: queued on the source's stream, which first waits for the destination's; that one then waits for
// it;
// - host to device: pageable memory is read before the call returns; pinned memory, with `non_blocking`, when the copy
//   runs. Without `non_blocking` the host waits for the stream;
// - device to host: with `non_blocking` into pinned memory, queued; else the host waits for the stream.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/Event.h>
#include <c10/core/Scalar.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "ops.h"

namespace anabranch::sim {
namespace {

const char* const kName = "aten::copy_";

// `to` and `from` are on the CPU, or stand for device memory there.
std::function<void()> copying(at::Tensor to, at::Tensor from) {
  return [to = std::move(to), from = std::move(from)] {
    Running running;
    to.copy_(from);
  };
}

void wait_for(c10::Stream waiting, c10::Stream other) {
  c10::Event event(kSim);
  event.record(other);
  event.block(waiting);
}

void between_devices(const at::Tensor& to, const at::Tensor& from) {
  Twins hosts(c10::kCPU);
  Work work{kName, {}, copying(hosts.of(to), hosts.of(from))};
  touch(work.ranges, from, false);
  touch(work.ranges, to, true);
  int device = from.device().index();
  if (to.device() == from.device()) {
    at::assert_no_partial_overlap(to, from);
    return enqueue(device, std::move(work));
  }
  c10::impl::VirtualGuardImpl streams(kSim);
  auto reads = streams.getStream(from.device()), writes = streams.getStream(to.device());
  wait_for(reads, writes);
  enqueue(device, std::move(work));
  wait_for(writes, reads);
}

void to_device(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  // CUDA makes a pageable copy of pinned memory that is not dense, and converts dtypes on the device.
  bool pinned = from.is_pinned() && from.sizes() == to.sizes() && from.is_contiguous();
  int device = to.device().index();
  Work work{kName, {}, nullptr};
  at::Tensor host;
  if (pinned) {
    host = keep(from);
    touch(work.ranges, host, false);
    work.host_async = non_blocking;
  } else {
    if (non_blocking && capturing(device)) refuse_in_capture("copying from pageable host memory");
    Below below;
    host = from.clone(at::MemoryFormat::Contiguous);
  }
  work.run = copying(Twins(c10::kCPU).of(to), host);
  touch(work.ranges, to, true);
  enqueue(device, std::move(work));
  if (!non_blocking) synchronize_current(device);
}

void to_host(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  bool async = non_blocking && to.is_pinned() && from.sizes() == to.sizes() && to.is_contiguous();
  int device = from.device().index();
  auto host = keep(to);
  Work work{kName, {}, copying(host, Twins(c10::kCPU).of(from))};
  work.host_async = async;
  touch(work.ranges, from, false);
  if (async) touch(work.ranges, host, true);
  enqueue(device, std::move(work));
  if (!async) synchronize_current(device);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  TORCH_CHECK_NOT_IMPLEMENTED(self.layout() == c10::kStrided && dst.layout() == c10::kStrided,
                              "sim copies strided tensors only, not ", self.layout(), " to ", dst.layout(),
                              "; use x.to_dense()");
  for (auto& t : {self, dst}) {
    TORCH_CHECK_NOT_IMPLEMENTED(on_sim(t) || t.is_cpu(), "sim cannot copy between ", self.device(), " and ",
                                dst.device(), "; copy to the CPU first");
  }
  auto from = self.sizes() == dst.sizes() ? self : self.expand(dst.sizes());
  if (!dst.numel()) return dst;
  at::assert_no_internal_overlap(dst);
  if (!on_sim(from)) {
    to_device(dst, from, non_blocking);
  } else if (!on_sim(dst)) {
    to_host(dst, from, non_blocking);
  } else {
    between_devices(dst, from);
  }
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

// A copy of one element to the host, which waits for it.
at::Scalar local_scalar_dense(const at::Tensor& self) {
  TORCH_CHECK(self.numel() == 1, "sim: one element expected, not ", self.numel());
  auto value = std::make_shared<at::Scalar>();
  Work work{"aten::_local_scalar_dense", {}, [value, host = Twins(c10::kCPU).of(self)] {
              Running running;
              *value = at::_local_scalar_dense(host);
            }};
  touch(work.ranges, self, false);
  int device = self.device().index();
  enqueue(device, std::move(work));
  synchronize_current(device);
  return *value;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

// Copies know conjugated and negated tensors themselves; PyTorch would copy them first, with this very operator.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace anabranch::sim
