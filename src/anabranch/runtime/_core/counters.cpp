#include "counters.h"

namespace anabranch::runtime {

namespace {

std::atomic<size_t> next_thread{0};

}  // namespace

Counters::Shard& Counters::mine() {
  thread_local size_t number = next_thread.fetch_add(1, std::memory_order_relaxed);
  return shards_[number % kShards];
}

int64_t Counters::read(Name name) const {
  int64_t sum = 0;
  for (auto& shard : shards_) sum += shard.counts[name].load(names[name]);
  return sum;
}

}  // namespace anabranch::runtime
