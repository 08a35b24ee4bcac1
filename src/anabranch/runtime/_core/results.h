// How a call's results are made: new tensors, one new piece of memory for each storage of the captured results.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/util/SmallVector.h>

#include <vector>

namespace anabranch::runtime {

// New memory of a call's results, a piece for each storage that they lie in.
struct Region {
  c10::Storage storage;
  void* data = nullptr;
};
using Regions = c10::SmallVector<Region, 4>;
using Tensors = c10::SmallVector<at::Tensor, 4>;

// Which result lies where. Tensors that share a storage share one in a call's results, too, as eager's would.
class ResultLayout {
 public:
  // `results` as the kernels left them. `whole[i]`: the i-th storage (in the order in which they appear) is made as
  // large as it is, not only what the results cover.
  ResultLayout(const std::vector<at::Tensor>& results, const std::vector<bool>& whole);

  // On the current stream of the current device.
  Regions allocate() const;
  Tensors tensors(const Regions& regions) const;

  // The storages of `results` in order, and of each where its part in the layout begins.
  std::vector<const char*> sources(const std::vector<at::Tensor>& results) const;
  size_t bytes(size_t region) const { return regions_[region].bytes; }
  size_t size() const { return regions_.size(); }

 private:
  struct Part {
    size_t first = 0;  // the first result that lies in it
    size_t start = 0;  // bytes from the beginning of the storage
    size_t bytes = 0;
  };
  struct Result {
    size_t region;
    caffe2::TypeMeta dtype;
    c10::DispatchKeySet keys;
    c10::SmallVector<int64_t, 5> sizes, strides;
    int64_t offset;  // elements from the beginning of the part
  };
  c10::Allocator* allocator_ = nullptr;
  std::vector<Part> regions_;
  std::vector<Result> results_;
};

// Bytes of `t` in its storage: [first, second).
std::pair<size_t, size_t> extent(const at::Tensor& t);

}  // namespace anabranch::runtime
