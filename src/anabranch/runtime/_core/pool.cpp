#include "pool.h"

#include <algorithm>
#include <chrono>

namespace anabranch::runtime {

// -- Limits ----------------------------------------------------------------------------------------------------------

Limits::Limits(int64_t max_contexts, int64_t memory_limit) : max_contexts(max_contexts), memory_limit(memory_limit) {}

bool Limits::reserve(int64_t bytes) {
  for (;;) {
    auto contexts = contexts_.load("read");
    if (contexts >= max_contexts) return false;
    if (contexts_.change("reserve", contexts, contexts + 1)) break;
  }
  for (;;) {
    auto held = bytes_.load("read");
    if (!fits(held + bytes)) {
      contexts_.add("give back", -1);
      return false;
    }
    if (bytes_.change("reserve", held, held + bytes)) return true;
  }
}

bool Limits::has_room(int64_t bytes) const {
  return contexts_.load("read") < max_contexts && fits(bytes_.load("read") + bytes);
}

bool Limits::confirm(int64_t reserved, int64_t actual) {
  return fits(bytes_.add("confirm", actual - reserved) + actual - reserved);
}

void Limits::forget(int64_t bytes) {
  bytes_.add("forget", -bytes);
  contexts_.add("forget", -1);
}

// -- Pool ------------------------------------------------------------------------------------------------------------

namespace {

std::atomic<uint64_t> next_serial{1};

// Which slot this thread had last on a stream, of the pools that it used lately. Only a hint: the slot may be in other
// hands by now, and is then left alone. Nothing is owned here, so a thread may end at any time.
struct Hint {
  uint64_t pool = 0;
  int64_t stream = 0;
  Slot* slot = nullptr;
};
constexpr size_t kHints = 16;
thread_local Hint t_hints[kHints];

Hint& hint(uint64_t pool, int64_t stream) {
  auto mixed = (pool * 0x9E3779B97F4A7C15u) ^ (static_cast<uint64_t>(stream) * 0xC2B2AE3D27D4EB4Fu);
  return t_hints[(mixed >> 32) % kHints];
}

int64_t now() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

}  // namespace

Pool::Pool(Limits* limits) : limits_(limits), serial_(next_serial.fetch_add(1)) {}

Pool::~Pool() = default;

void Pool::remember(Slot* slot, int64_t stream) {
  hint(serial_, stream) = {serial_, stream, slot};
}

Slot* Pool::by_hint(int64_t stream) {
  auto& h = hint(serial_, stream);
  if (h.pool != serial_ || h.stream != stream) return nullptr;
#ifdef ANABRANCH_MUTANT_UNCHECKED_HINT
  // Planted for the tests of the tests: the slot is taken without a look at whose it is.
  h.slot->state.poke(Slot::kTaken);
  return h.slot;
#endif
  if (waiting_.load("look for waiters")) return nullptr;
  if (!h.slot->state.change("take by hint", Slot::kIdle, Slot::kTaken)) return nullptr;
  if (h.slot->used_on.load(std::memory_order_relaxed) == stream) return h.slot;
  // Another stream had it since. There may be a better one, so it goes back as it came.
  h.slot->state.store("put back", Slot::kIdle);
  if (waiting_.load("look for waiters")) serve();
  return nullptr;
}

// An idle slot for a call on `stream`, taken: one last used there, else one never used. With the lock held, but others
// may take slots by their hints meanwhile, and give them back.
Slot* Pool::choose(int64_t stream) {
  for (auto wanted : {stream, Slot::kNever}) {
    for (auto& slot : slots_) {
      // What its owner wrote can be relied on only where it has none.
      if (slot.state.load("look") != Slot::kIdle || slot.used_on.load(std::memory_order_relaxed) != wanted) continue;
      if (slot.state.change("take", Slot::kIdle, Slot::kTaken)) return &slot;
    }
  }
  return nullptr;
}

// The least recently used idle slot, taken. With the lock held.
Slot* Pool::oldest() {
  for (;;) {
    Slot* found = nullptr;
    for (auto& slot : slots_) {
      if (slot.state.load("look") != Slot::kIdle) continue;
      auto used_at = slot.used_at.load(std::memory_order_relaxed);
      if (!found || used_at < found->used_at.load(std::memory_order_relaxed)) found = &slot;
    }
    if (!found || found->state.change("take", Slot::kIdle, Slot::kTaken)) return found;
  }
}

Pool::Grant Pool::acquire(int64_t stream, bool may_build) {
  auto granted = [&](Slot* slot) {
    auto used_on = slot->used_on.load(std::memory_order_relaxed);
    return Grant{Grant::kContext, slot, 0, used_on != Slot::kNever && used_on != stream};
  };
  if (auto* slot = by_hint(stream)) return granted(slot);

  std::unique_ptr<Waiter> waiter;
  {
    std::lock_guard<Mutex> guard(lock_);
    if (line_.empty()) {
      if (auto* slot = choose(stream)) return granted(slot);
    }
    if (!limits_) return {Grant::kRoom};
    if (may_build && limits_->reserve(estimate_)) return {Grant::kRoom, nullptr, estimate_, false};
    if (!alive_) return {};
    // In line first, and then one more look: see the top of pool.h.
    waiter = std::make_unique<Waiter>();
    line_.push_back(waiter.get());
    waiting_.store("stand in line", static_cast<int>(line_.size()));
    if (line_.size() == 1) {
      if (auto* slot = oldest()) {
        line_.pop_back();
        waiting_.store("leave the line", 0);
        return granted(slot);
      }
    }
  }
  waiter->ready.wait();
  return waiter->slot ? granted(waiter->slot) : Grant{};
}

Slot* Pool::add(std::unique_ptr<Payload> payload, int64_t bytes) {
  std::lock_guard<Mutex> guard(lock_);
  estimate_ = bytes;
  ++alive_;
  Slot* slot = nullptr;
  for (auto& candidate : slots_) {
    if (candidate.state.peek() == Slot::kEmpty) slot = &candidate;
  }
  if (!slot) slot = &slots_.emplace_back();
  slot->payload = std::move(payload);
  slot->used_on.store(Slot::kNever, std::memory_order_relaxed);
  slot->used_at.store(0, std::memory_order_relaxed);
  slot->state.poke(Slot::kTaken);
  return slot;
}

void Pool::release(Slot* slot, int64_t stream) {
  slot->used_on.store(stream, std::memory_order_relaxed);
  slot->used_at.store(stream == Slot::kNever ? 0 : now(), std::memory_order_relaxed);
  if (stream != Slot::kNever) remember(slot, stream);
  slot->state.store("give back", Slot::kIdle);
  if (waiting_.load("look for waiters")) serve();
}

// Idle slots go to those who wait, in the order in which they came.
void Pool::serve() {
  std::lock_guard<Mutex> guard(lock_);
  for (auto& slot : slots_) {
    if (line_.empty()) break;
    if (!slot.state.change("take for a waiter", Slot::kIdle, Slot::kTaken)) continue;
    auto* waiter = line_.front();
    line_.pop_front();
    waiting_.store("serve", static_cast<int>(line_.size()));
    waiter->slot = &slot;
    waiter->ready.set();
  }
}

std::unique_ptr<Payload> Pool::discard(Slot* slot) {
  auto payload = std::move(slot->payload);
  std::lock_guard<Mutex> guard(lock_);
  slot->state.store("discard", Slot::kEmpty);
  if (!--alive_) send_away();
  return payload;
}

std::vector<std::unique_ptr<Payload>> Pool::drain() {
  std::vector<std::unique_ptr<Payload>> all;
  std::lock_guard<Mutex> guard(lock_);
  for (auto& slot : slots_) {
    if (!slot.state.change("drain", Slot::kIdle, Slot::kTaken)) continue;
    all.push_back(std::move(slot.payload));
    slot.state.store("drain", Slot::kEmpty);
    --alive_;
  }
  if (!alive_) send_away();
  return all;
}

// No context will come back: whoever waits goes on without one.
void Pool::send_away() {
  for (auto* waiter : line_) waiter->ready.set();
  line_.clear();
  waiting_.store("send away", 0);
}

int64_t Pool::estimate() {
  std::lock_guard<Mutex> guard(lock_);
  return estimate_;
}

int64_t Pool::alive() {
  std::lock_guard<Mutex> guard(lock_);
  return alive_;
}

void Pool::for_each(const std::function<void(Payload&)>& visit) {
  std::lock_guard<Mutex> guard(lock_);
  for (auto& slot : slots_) {
    if (slot.payload) visit(*slot.payload);
  }
}

void Pool::forget_uses() {
  std::lock_guard<Mutex> guard(lock_);
  for (auto& slot : slots_) {
    slot.used_on.store(Slot::kNever, std::memory_order_relaxed);
    slot.used_at.store(0, std::memory_order_relaxed);
  }
}

void Pool::after_fork() {
  lock_.renew();
  line_.clear();
  waiting_.poke(0);
  alive_ = 0;
  for (auto& slot : slots_) {
    if (slot.state.peek() == Slot::kIdle) {
      ++alive_;
    } else {
      (void)slot.payload.release();  // its owner was in the middle of using it
      slot.state.poke(Slot::kEmpty);
    }
  }
}

}  // namespace anabranch::runtime
