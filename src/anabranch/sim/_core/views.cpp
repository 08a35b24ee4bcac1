// Empty tensors, and what changes or shares a tensor's metadata: nothing here is queued, apart from the copy into a
// larger storage.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "ops.h"

namespace anabranch::sim {

void reshape(const at::Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides, int64_t offset) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(sizes, strides, offset);
  if (!tensor.numel()) return;
  auto needed = at::detail::computeStorageNbytes(sizes, strides, impl->itemsize(), static_cast<size_t>(offset));
  if (needed <= tensor.storage().nbytes()) return;
  TORCH_CHECK(tensor.storage().resizable(), "Trying to resize storage that is not resizable");
  at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), needed);
}

namespace {

using Device = std::optional<c10::Device>;
using Sizes = c10::IntArrayRef;

void check_options(std::optional<c10::Layout> layout, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK_NOT_IMPLEMENTED(layout.value_or(c10::kStrided) == c10::kStrided, "sim has strided tensors only, not ",
                              *layout, "; use torch.strided");
}

at::Tensor empty(Sizes sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout, Device device,
                 std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  check_options(layout, pinned);
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, c10::GetAllocator(kSim), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(Sizes sizes, Sizes strides, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout> layout, Device device, std::optional<bool> pinned) {
  check_options(layout, pinned);
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, c10::GetAllocator(kSim),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, Sizes sizes, Sizes strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

const at::Tensor& resize_(const at::Tensor& self, Sizes sizes, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != sizes) {
    auto offset = self.storage_offset();
    impl->set_sizes_contiguous(sizes);
    auto strides = impl->strides().vec();
    reshape(self, sizes, strides, offset);
  }
  if (format) {
    TORCH_CHECK(*format != c10::MemoryFormat::Preserve, "Unsupported memory format ", *format);
    impl->empty_tensor_restride(*format);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, Sizes sizes, Sizes strides) {
  TORCH_CHECK(source.device() == self.device(), "sim: set_ of a tensor on ", self.device(), " with a storage on ",
              source.device(), "; give a storage on the same device");
  at::native::checkSetStorage(self, source, offset, sizes, strides);
  auto* impl = self.unsafeGetTensorImpl();
  if (strides.data() || sizes.empty()) {
    reshape(self, sizes, strides, offset);
  } else {
    impl->set_sizes_contiguous(sizes);
    auto contiguous = impl->strides().vec();
    reshape(self, sizes, contiguous, offset);
  }
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  auto items = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, items, 1);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  auto* allocator = c10::GetAllocator(kSim);
  const c10::DeviceGuard guard(self.device());
  return set_whole(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, allocator->allocate(0), allocator, true));
}

bool is_set_to(const at::Tensor& self, const at::Tensor& other) {
  return self.storage().unsafeGetStorageImpl() == other.storage().unsafeGetStorageImpl() &&
         self.storage_offset() == other.storage_offset() && self.sizes() == other.sizes() &&
         self.strides() == other.strides();
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  TORCH_CHECK(stream.device_type() == kSim, "sim: record_stream with a stream of ", stream.device(),
              "; give a stream of sim");
  c10::impl::VirtualGuardImpl(kSim).recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("is_set_to", &is_set_to);
  m.impl("record_stream", &record_stream);
}

}  // namespace
}  // namespace anabranch::sim
