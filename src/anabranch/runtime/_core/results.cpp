#include "results.h"

#include <c10/core/DispatchKeySet.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <unordered_map>

namespace anabranch::runtime {

std::pair<size_t, size_t> extent(const at::Tensor& t) {
  auto start = static_cast<size_t>(t.storage_offset()) * t.element_size();
  if (!t.numel()) return {start, start};
  size_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += static_cast<size_t>((t.size(d) - 1) * t.stride(d));
  return {start, start + (last + 1) * t.element_size()};
}

ResultLayout::ResultLayout(const std::vector<at::Tensor>& results, const std::vector<bool>& whole) {
  std::unordered_map<c10::StorageImpl*, size_t> known;
  std::vector<size_t> members;
  std::vector<size_t> region_of(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    auto& t = results[i];
    allocator_ = c10::GetAllocator(t.device().type());
    auto [found, is_new] = known.try_emplace(t.storage().unsafeGetStorageImpl(), regions_.size());
    auto [start, stop] = extent(t);
    if (is_new) {
      regions_.push_back({i, start, stop});
      members.push_back(0);
    }
    auto& part = regions_[found->second];
    part.start = std::min(part.start, start);
    part.bytes = std::max(part.bytes, stop);  // where it ends, for now
    ++members[found->second];
    region_of[i] = found->second;
  }
  for (size_t r = 0; r < regions_.size(); ++r) {
    auto& part = regions_[r];
    // Sizes of every dtype divide 16, so rounding down keeps each tensor's offset a whole number of elements.
    if (members[r] > 1) part.start -= part.start % 16;
    if (whole[r]) {
      part.start = 0;
      part.bytes = results[part.first].storage().nbytes();
    }
    part.bytes -= part.start;
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto& t = results[i];
    auto start = static_cast<int64_t>(regions_[region_of[i]].start);
    auto offset = (t.storage_offset() * t.element_size() - start) / t.element_size();
    auto key = c10::computeDispatchKey(t.scalar_type(), c10::kStrided, t.device());
    results_.push_back({region_of[i], t.dtype(), c10::DispatchKeySet(key),
                        c10::SmallVector<int64_t, 5>(t.sizes().begin(), t.sizes().end()),
                        c10::SmallVector<int64_t, 5>(t.strides().begin(), t.strides().end()), offset});
  }
}

std::vector<const char*> ResultLayout::sources(const std::vector<at::Tensor>& results) const {
  std::vector<const char*> all;
  for (auto& part : regions_) {
    auto* data = static_cast<const char*>(results[part.first].storage().data());
    all.push_back(data ? data + part.start : nullptr);
  }
  return all;
}

Regions ResultLayout::allocate() const {
  Regions all;
  for (auto& part : regions_) {
    auto data = allocator_->allocate(part.bytes);
    void* address = data.get();
    all.push_back({c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), part.bytes,
                                                                      std::move(data), allocator_, true)),
                   address});
  }
  return all;
}

Tensors ResultLayout::tensors(const Regions& regions) const {
  Tensors all;
  for (auto& result : results_) {
    c10::Storage storage = regions[result.region].storage;
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), result.keys, result.dtype);
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes, result.strides, result.offset);
    all.push_back(std::move(tensor));
  }
  return all;
}

}  // namespace anabranch::runtime
