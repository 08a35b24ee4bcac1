#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "sync.h"

namespace anabranch::runtime {

// What an engine has done so far. Threads: any.
class Counters {
 public:
  enum Name {
    kCalls,
    kGraphCalls,
    kDirectCalls,
    kCaptured,
    kWaits,
    kWaitsForBuild,
    kCaptures,
    kSpecializations,
    kNames
  };
  static constexpr std::array<const char*, kNames> names{
      "calls", "graph_calls",     "direct_calls", "calls_in_captures",
      "waits", "waits_for_build", "captures",     "specializations"};

  void add(Name name, int64_t count = 1) { mine().counts[name].count(names[name], count); }
  int64_t read(Name name) const {
    int64_t sum = 0;
    for (auto& shard : shards_) sum += shard.counts[name].load(names[name]);
    return sum;
  }

 private:
  // Threads count in different places, so that they do not wait for each other's cache lines.
  struct alignas(64) Shard {
    Shard() : counts{make(0), make(1), make(2), make(3), make(4), make(5), make(6), make(7)} {}
    static Atomic<int64_t> make(int i) { return Atomic<int64_t>(names[static_cast<size_t>(i)], 0); }
    std::array<Atomic<int64_t>, kNames> counts;
  };
  static constexpr size_t kShards = 16;
  Shard& mine() {
    thread_local size_t number = next_thread_.fetch_add(1, std::memory_order_relaxed);
    return shards_[number % kShards];
  }
  static inline std::atomic<size_t> next_thread_{0};
  std::array<Shard, kShards> shards_;
};

}  // namespace anabranch::runtime
