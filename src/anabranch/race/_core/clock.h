// Vector clocks over components: one component a stream and one a host thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace anabranch::race {

// Component `c` of the clock of X says how many of c's items happen before X's next one. Absent components are 0.
class Clock {
 public:
  uint64_t at(uint32_t component) const { return component < ticks_.size() ? ticks_[component] : 0; }

  uint64_t tick(uint32_t component) {
    if (component >= ticks_.size()) ticks_.resize(component + 1, 0);
    return ++ticks_[component];
  }

  // Pointwise maximum. Returns true when this clock changed.
  bool join(const Clock& other) {
    if (other.ticks_.size() > ticks_.size()) ticks_.resize(other.ticks_.size(), 0);
    bool changed = false;
    uint64_t* mine = ticks_.data();
    const uint64_t* theirs = other.ticks_.data();
    for (size_t i = 0, n = other.ticks_.size(); i < n; ++i) {
      const bool later = theirs[i] > mine[i];
      mine[i] = later ? theirs[i] : mine[i];
      changed |= later;
    }
    return changed;
  }

  bool covers(uint32_t component, uint64_t tick) const { return at(component) >= tick; }
  bool empty() const { return ticks_.empty(); }
  size_t size() const { return ticks_.size(); }
  void clear() { ticks_.clear(); }

 private:
  std::vector<uint64_t> ticks_;
};

}  // namespace anabranch::race
