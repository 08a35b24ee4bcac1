#include "tensors.h"

#include <c10/core/Allocator.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/TensorImpl.h>

namespace anabranch::runtime {

namespace {

at::Tensor tensor(c10::Storage storage, c10::DispatchKeySet keys, caffe2::TypeMeta dtype, const Sizes& sizes,
                  const Sizes& strides, int64_t offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, dtype);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return made;
}

}  // namespace

at::Tensor new_tensor(const Sizes& sizes, const Sizes& strides, at::ScalarType dtype, c10::Device device) {
  auto type = caffe2::TypeMeta::fromScalarType(dtype);
  size_t elements = 1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    TORCH_CHECK(sizes[d] >= 0, "a size is ", sizes[d]);
    elements = sizes[d] && elements ? elements + static_cast<size_t>((sizes[d] - 1) * strides[d]) : 0;
  }
  auto bytes = elements * type.itemsize();
  auto* allocator = c10::GetAllocator(device.type());
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                             allocator->allocate(bytes), allocator, true));
  c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, c10::kStrided, device));
  return tensor(std::move(storage), keys, type, sizes, strides, 0);
}

at::Tensor view_of(const at::Tensor& base, const Sizes& sizes, const Sizes& strides, int64_t offset) {
  return tensor(base.storage(), base.key_set(), base.dtype(), sizes, strides, base.storage_offset() + offset);
}

}  // namespace anabranch::runtime
