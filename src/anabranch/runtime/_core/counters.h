#pragma once

#include <array>
#include <cstdint>

#include "sync.h"

namespace anabranch::runtime {

// What an engine has done so far. Threads: any.
class Counters {
 public:
  enum Name { kCalls, kGraphCalls, kDirectCalls, kCaptured, kWaits, kCaptures, kSpecializations, kNames };
  static constexpr std::array<const char*, kNames> names{"calls", "graph_calls", "direct_calls",   "calls_in_captures",
                                                         "waits", "captures",    "specializations"};

  void add(Name name, int64_t count = 1) { mine().counts[name].count(names[name], count); }
  int64_t read(Name name) const;

 private:
  // Threads count in different places, so that they do not wait for each other's cache lines.
  struct alignas(64) Shard {
    Shard() : counts{make(0), make(1), make(2), make(3), make(4), make(5), make(6)} {}
    static Atomic<int64_t> make(int i) { return Atomic<int64_t>(names[static_cast<size_t>(i)], 0); }
    std::array<Atomic<int64_t>, kNames> counts;
  };
  static constexpr size_t kShards = 16;
  Shard& mine();
  std::array<Shard, kShards> shards_;
};

}  // namespace anabranch::runtime
