// The allocator: blocks belong to a stream of a pool and go back to it; whoever else uses one has to say so.
#include "machine.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace anabranch::sim {

namespace {
constexpr size_t kGranule = 512;
constexpr size_t kWorkspaceBytes = 512;

void fill(char* data, size_t bytes) {
  auto* words = reinterpret_cast<uint16_t*>(data);
  std::fill(words, words + bytes / 2, kPoison);
}
}  // namespace

std::string Machine::pool_key(int device, int64_t pool, int64_t stream) {
  return "p" + std::to_string(pool) + "d" + std::to_string(device) + "s" + std::to_string(stream);
}

Touches Machine::allocation_touches(size_t bytes, const QueuePtr& queue, int64_t pool) {
  Touches all{{pool_key(queue->device, pool, queue->id), 0, 1, kWrite}};
  bytes = (bytes + kGranule - 1) / kGranule * kGranule;
  for (auto* block : cached_[{queue->device, pool, queue->id}]) {
    if (block->bytes != bytes) continue;
    if (all.size() == 1) all.push_back({"q" + queue->actor, 0, 1, kWrite});  // its poison is queued
    // Whether it may be handed out is a question to the device.
    for (auto& dep : block->pending) all.push_back({"y" + dep.op, 0, 1, kRead});
  }
  return all;
}

Block* Machine::allocate(size_t bytes, const QueuePtr& queue, int64_t pool, const std::string& name) {
  fault("alloc");
  size_t rounded = std::max(kGranule, (bytes + kGranule - 1) / kGranule * kGranule);
  auto& cached = cached_[{queue->device, pool, queue->id}];
  Block* block = nullptr;
  for (auto it = cached.rbegin(); it != cached.rend(); ++it) {
    if ((*it)->bytes == rounded && done((*it)->pending)) {
      block = *it;
      cached.erase(std::next(it).base());
      break;
    }
  }
  std::string before;
  if (block) {
    before = block->name;
  } else {
    if (limit[queue->device]) {
      TORCH_CHECK_WITH(
          OutOfMemoryError, reserved(queue->device) + static_cast<int64_t>(rounded) <= limit[queue->device],
          "sim out of memory: ", bytes, " bytes asked for, ", reserved(queue->device), " of ", limit[queue->device],
          " held on sim:", queue->device, "; free tensors, or raise anabranch.sim.core.limit");
    }
    auto* data = static_cast<char*>(std::aligned_alloc(kGranule, rounded));
    TORCH_CHECK_WITH(OutOfMemoryError, data, "sim: the host has no ", rounded, " bytes");
    fill(data, rounded);
    auto made = std::make_unique<Block>();
    block = made.get();
    block->data = data;
    block->bytes = rounded;
    block->id = make_id(&Ids::block);
    block->device = queue->device;
    block->pool = pool;
    block->stream = queue->id;
    blocks_[reinterpret_cast<uintptr_t>(data)] = std::move(made);
  }
  block->live = true;
  block->capture = pool ? queue->capture : nullptr;
  if (block->capture) {
    // What a capture allocates is the graph's, also what it frees again: the trace knows it by the memory it has.
    block->name = "c" + std::to_string(block->capture->id) + "m" + block->id;
  } else {
    block->name = name.empty() ? "b" + (before.empty() ? block->id : make_id(&Ids::block)) : name;
    log(nullptr, R"({"do":"alloc","buffer":")" + block->name + R"(","stream":")" + queue->trace_name() + '"' +
                     (before.empty() ? "" : R"(,"reuses":")" + before + '"'));
  }
  // Inside a capture even what is fresh: each replay finds what the last one left.
  if (!before.empty() || block->capture) poison(*block, queue);
  block->others.clear();
  block->pending.clear();
  return block;
}

// When a block is handed out again, not when it is freed: a program may free it before it orders the block's stream
// after another one that still reads it. Queued like any other work of that stream, so that no rightful reader is
// harmed.
void Machine::poison(Block& block, const QueuePtr& queue) {
  Op op;
  op.id = make_id(&Ids::op);
  op.name = "poison " + block.name;
  op.poison = true;
  auto lo = reinterpret_cast<uintptr_t>(block.data);
  op.ranges = {{lo, lo + block.bytes, true}};
  op.run = [data = block.data, bytes = block.bytes] { fill(data, bytes); };
  if (queue->capture && block.capture == queue->capture) {
    push(queue, std::move(op));
  } else {
    push_real(queue, std::move(op));  // not the business of a capture that happens to be under way
  }
}

void Machine::release(void* data) {
  auto found = blocks_.find(reinterpret_cast<uintptr_t>(data));
  if (found == blocks_.end()) return;
  auto& block = *found->second;
  if (!block.capture) log(nullptr, R"({"do":"free","buffer":")" + block.name + '"');
  block.live = false;
  block.pending.clear();
  for (auto& other : block.others) add(block.pending, frontier(other));
  block.capture = nullptr;
  cached_[{block.device, block.pool, block.stream}].push_back(&block);
}

void Machine::record_stream(void* data, const QueuePtr& queue) {
  auto* block = block_of(reinterpret_cast<uintptr_t>(data));
  if (!block || (block->stream == queue->id && block->device == queue->device)) return;
  if (std::find(block->others.begin(), block->others.end(), queue) == block->others.end())
    block->others.push_back(queue);
  log(nullptr, R"({"do":"record_stream","buffer":")" + block->name + R"(","stream":")" + queue->trace_name() + '"');
}

Block* Machine::block_of(uintptr_t address) {
  auto after = blocks_.upper_bound(address);
  if (after == blocks_.begin()) return nullptr;
  auto& block = *std::prev(after)->second;
  return address < reinterpret_cast<uintptr_t>(block.data) + block.bytes ? &block : nullptr;
}

Block* Machine::workspace(const QueuePtr& queue) {
  auto& block = workspaces_[{queue->device, queue->id}];
  if (!block) block = allocate(kWorkspaceBytes, queue, current_pool(), "workspace of " + queue->actor);
  return block;
}

void Machine::load_workspace(const QueuePtr& queue) {
  workspace(queue);
}

int64_t Machine::pool_bytes(int64_t pool) {
  int64_t total = 0;
  for (auto& [address, block] : blocks_) {
    if (block->pool == pool) total += static_cast<int64_t>(block->bytes);
  }
  return total;
}

int64_t Machine::reserved(int device) {
  int64_t total = 0;
  for (auto& [address, block] : blocks_) {
    if (block->device == device) total += static_cast<int64_t>(block->bytes);
  }
  return total;
}

int64_t Machine::allocated(int device) {
  int64_t total = 0;
  for (auto& [address, block] : blocks_) {
    if (block->device == device && block->live) total += static_cast<int64_t>(block->bytes);
  }
  return total;
}

void Machine::trim(int64_t pool) {
  // Queued work may still touch what was freed: only with nothing queued is it safe to unmap.
  if (!pending_.empty()) return;
  for (auto& [key, list] : cached_) {
    if (std::get<1>(key) != pool) continue;
    for (auto* block : list) {
      std::free(block->data);
      blocks_.erase(reinterpret_cast<uintptr_t>(block->data));
    }
    list.clear();
  }
}

}  // namespace anabranch::sim
