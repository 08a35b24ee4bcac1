#pragma once

#include <memory>
#include <utility>

#include "../pool.h"
#include "gil.h"

namespace anabranch::runtime {

// Room in the limits for one more context. Given back when this goes, unless its context has: an exception may leave
// the build anywhere.
class Reservation {
 public:
  Reservation(std::shared_ptr<PyObject> limits, int64_t bytes)
      : kept_(std::move(limits)), limits_(py::handle(kept_.get()).cast<Limits*>()), bytes_(bytes) {}
  ~Reservation() { cancel(); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  int64_t bytes() const { return bytes_; }
  bool confirm(int64_t actual) {
    bool fits = limits_->confirm(bytes_, actual);
    bytes_ = actual;
    return fits;
  }
  void cancel() {
    if (std::exchange(is_held_, false)) limits_->forget(bytes_);
  }

 private:
  std::shared_ptr<PyObject> kept_;
  Limits* limits_;
  int64_t bytes_;
  bool is_held_ = true;
};

}  // namespace anabranch::runtime
