// Stand-ins for device tensors, the bytes they cover, and the thread state in which kernels run.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/Allocator.h>
#include <c10/core/DispatchKeySet.h>

#include <algorithm>

#include "ops.h"

namespace anabranch::sim {

Below::Below()
    : keys_(c10::default_included_set - c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView),
            c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})),
      functions_(at::impl::PythonTorchFunctionTLS::get_disabled_state()) {
  at::impl::PythonTorchFunctionTLS::set_disabled_state(at::impl::TorchFunctionDisabledState::ALL_DISABLED);
}

Below::~Below() {
  at::impl::PythonTorchFunctionTLS::set_disabled_state(functions_);
}

c10::WarningHandler* Running::nobody() {
  struct Nobody final : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  static Nobody nobody;
  return &nobody;
}

namespace {
c10::Storage stand_in(const c10::Storage& storage, c10::DeviceType type) {
  // A kernel may make a meta storage larger (`out=`). Device memory is resized when an operator is queued, never when
  // it runs: there it is an error.
  bool meta = type == c10::kMeta;
  c10::DataPtr data(meta ? nullptr : const_cast<void*>(storage.data()), c10::Device(type));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      meta ? c10::GetAllocator(c10::kMeta) : nullptr, meta);
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  at::Tensor made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}
}  // namespace

at::Tensor Twins::of(const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  for (auto& [known, twin] : tensors_) {
    if (known == impl) return twin;
  }
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto found = std::find_if(storages_.begin(), storages_.end(), [&](auto& pair) { return pair.first == storage; });
  if (found == storages_.end()) {
    storages_.emplace_back(storage, stand_in(tensor.storage(), type_));
    found = std::prev(storages_.end());
  }
  auto twin = over(found->second, type_ == c10::kMeta ? c10::DispatchKey::Meta : c10::DispatchKey::CPU, tensor);
  tensors_.emplace_back(impl, twin);
  return twin;
}

at::Tensor keep(const at::Tensor& tensor) {
  return over(tensor.storage(), c10::DispatchKey::CPU, tensor);
}

void touch(std::vector<Range>& ranges, const at::Tensor& tensor, bool write) {
  constexpr int64_t kPieces = 16;  // more is one range with the gaps in it
  if (!tensor.numel()) return;
  std::vector<std::pair<int64_t, int64_t>> gaps;  // stride in bytes and size, of dimensions that leave gaps
  auto item = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d)) gaps.emplace_back(tensor.stride(d) * item, tensor.size(d));
  }
  std::sort(gaps.begin(), gaps.end());
  int64_t pieces = 1, run = item;
  for (auto& [stride, size] : gaps) pieces *= size;
  while (!gaps.empty() && (gaps[0].first <= run || pieces > kPieces)) {
    run = std::max(run, (gaps[0].second - 1) * gaps[0].first + run);
    pieces /= gaps[0].second;
    gaps.erase(gaps.begin());
  }
  auto first = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  for (int64_t piece = 0; piece < pieces; ++piece) {
    int64_t at = 0, rest = piece;
    for (auto& [stride, size] : gaps) at += rest % size * stride, rest /= size;
    auto lo = first + static_cast<uintptr_t>(at);
    ranges.push_back({lo, lo + static_cast<uintptr_t>(run), write});
  }
}

void synchronize_current(int device) {
  int64_t stream;
  {
    Lock lock;
    stream = current_queue(device)->id;
  }
  synchronize_stream(device, stream);
}

bool capturing(int device) {
  Lock lock;
  return current_queue(device)->capture != nullptr;
}

}  // namespace anabranch::sim
