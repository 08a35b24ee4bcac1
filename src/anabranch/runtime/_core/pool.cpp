#include "pool.h"

#include <algorithm>
#include <chrono>

#include "planted.h"

namespace anabranch::runtime {

// -- Limits ----------------------------------------------------------------------------------------------------------

Limits::Limits(int64_t max_contexts, int64_t memory_limit) : max_contexts(max_contexts), memory_limit(memory_limit) {}

bool Limits::reserve(int64_t bytes) {
  for (;;) {
    auto held = held_.load("read");
    if (!has_room(held, bytes)) return false;
    if (held_.change("reserve", held, held + kOne + bytes)) return true;
  }
}

bool Limits::has_room(int64_t bytes) const {
  return has_room(held_.load("read"), bytes);
}

bool Limits::confirm(int64_t reserved, int64_t actual) {
  return fits(bytes(held_.add("confirm", actual - reserved)) + actual - reserved);
}

void Limits::forget(int64_t bytes) {
  held_.add("forget", -kOne - bytes);
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

// From `from`, which the caller has seen, to another state with the same stream.
bool Pool::change(Slot& slot, int64_t from, Slot::State state) {
  return slot.word_.change("change", from, Slot::word(state, Slot::stream(from)));
}

Slot* Pool::by_hint(int64_t stream) {
  auto& h = hint(serial_, stream);
  if (h.pool != serial_ || h.stream != stream) return nullptr;
  if (planted("unchecked hint")) {  // the slot is taken without a look at whose it is
    h.slot->word_.poke(Slot::word(Slot::kTaken, stream));
    return h.slot;
  }
  return change(*h.slot, Slot::word(Slot::kIdle, stream), Slot::kTaken) ? h.slot : nullptr;
}

Pool::Acquired Pool::taken(Slot* slot, int64_t stream) {
  auto used_on = Slot::stream(slot->word_.peek());
  return {.kind = Acquired::kContext,
          .slot = slot,
          .waits = used_on != Slot::kNever && used_on != stream,
          .same_stream = used_on == stream};
}

Pool::Acquired Pool::acquire(int64_t stream, bool may_build) {
  if (auto* slot = by_hint(stream)) return {.kind = Acquired::kContext, .slot = slot, .same_stream = true};

  std::unique_ptr<Waiter> waiter;
  {
    std::lock_guard<Mutex> guard(lock_);
    bool can_build = may_build;
    // Others may take idle slots by their hints, and give slots back, while this looks: then it looks again.
    while (line_.empty()) {
      Slot *best = nullptr, *oldest = nullptr;
      int64_t best_word = 0, oldest_word = 0;
      for (auto& slot : slots_) {
        auto word = slot.word_.load("look");
        if (Slot::state(word) != Slot::kIdle) continue;
        bool is_here = Slot::stream(word) == stream;
        if (is_here || (!best && Slot::stream(word) == Slot::kNever)) best = &slot, best_word = word;
        if (is_here) break;
        if (!oldest ||
            slot.used_at_.load(std::memory_order_relaxed) < oldest->used_at_.load(std::memory_order_relaxed)) {
          oldest = &slot, oldest_word = word;
        }
      }
      if (best) {
        if (change(*best, best_word, Slot::kTaken)) return taken(best, stream);
        continue;
      }
      if (!limits_) return {.kind = Acquired::kRoom};
      if (can_build) {
        if (limits_->reserve(estimate_)) return {.kind = Acquired::kRoom, .reserved = estimate_};
        can_build = false;
      }
      if (!oldest) break;
      if (change(*oldest, oldest_word, Slot::kTaken)) return taken(oldest, stream);
    }
    if (can_build && limits_ && limits_->reserve(estimate_)) return {.kind = Acquired::kRoom, .reserved = estimate_};
    if (!alive_) return {};
    if (line_.empty()) {
      for (auto& slot : slots_) {
        for (;;) {
          auto word = slot.word_.load("look");
          if (Slot::state(word) == Slot::kIdle) {
            if (change(slot, word, Slot::kTaken)) return taken(&slot, stream);
          } else if (Slot::state(word) != Slot::kTaken || change(slot, word, Slot::kWanted)) {
            break;
          }
        }
      }
    }
    waiter = std::make_unique<Waiter>();
    line_.push_back(waiter.get());
  }
  waiter->ready.wait();
  return waiter->slot ? taken(waiter->slot, stream) : Acquired{};
}

Slot* Pool::add(std::unique_ptr<Payload> payload, int64_t bytes) {
  std::lock_guard<Mutex> guard(lock_);
  estimate_ = bytes;
  ++alive_;
  Slot* slot = nullptr;
  for (auto& candidate : slots_) {
    if (Slot::state(candidate.word_.peek()) == Slot::kEmpty) slot = &candidate;
  }
  if (!slot) slot = &slots_.emplace_back();
  slot->payload = std::move(payload);
  slot->bytes_ = bytes;
  slot->used_at_.store(0, std::memory_order_relaxed);
  slot->word_.poke(Slot::word(line_.empty() ? Slot::kTaken : Slot::kWanted, Slot::kNever));
  return slot;
}

void Pool::release(Slot* slot, int64_t stream) {
  auto before = slot->word_.peek();  // but for being wanted, the owner alone changes it
  slot->used_at_.store(stream == Slot::kNever ? 0 : now(), std::memory_order_relaxed);
  if (stream != Slot::kNever) hint(serial_, stream) = {serial_, stream, slot};
  auto taken = Slot::word(Slot::kTaken, Slot::stream(before));
  if (slot->word_.change("give back", taken, Slot::word(Slot::kIdle, stream))) return;

  std::lock_guard<Mutex> guard(lock_);
  if (line_.empty()) return slot->word_.store("give back", Slot::word(Slot::kIdle, stream));
  auto* waiter = line_.front();
  line_.pop_front();
  slot->word_.store("hand over", Slot::word(line_.empty() ? Slot::kTaken : Slot::kWanted, stream));
  waiter->slot = slot;
  waiter->ready.set();
}

bool Pool::take(Slot* slot) {
  auto word = slot->word_.load("look");
  return Slot::state(word) == Slot::kIdle && change(*slot, word, Slot::kTaken);
}

std::unique_ptr<Payload> Pool::discard(Slot* slot) {
  std::lock_guard<Mutex> guard(lock_);
  auto payload = std::move(slot->payload);  // with the lock held: `for_each` may be looking at it
  slot->word_.store("discard", Slot::word(Slot::kEmpty, Slot::kNever));
  if (!--alive_) send_away();
  return payload;
}

std::vector<std::unique_ptr<Payload>> Pool::drain() {
  std::vector<std::unique_ptr<Payload>> all;
  std::lock_guard<Mutex> guard(lock_);
  for (auto& slot : slots_) {
    auto word = slot.word_.load("look");
    if (Slot::state(word) != Slot::kIdle || !change(slot, word, Slot::kTaken)) continue;
    all.push_back(std::move(slot.payload));
    slot.word_.store("drain", Slot::word(Slot::kEmpty, Slot::kNever));
    --alive_;
  }
  return all;
}

// No context will come back: whoever waits goes on without one.
void Pool::send_away() {
  for (auto* waiter : line_) waiter->ready.set();
  line_.clear();
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
    slot.used_at_.store(0, std::memory_order_relaxed);
    slot.word_.poke(Slot::word(Slot::state(slot.word_.peek()), Slot::kNever));
  }
}

void Pool::after_fork() {
  lock_.renew();
  line_.clear();
  alive_ = 0;
  for (auto& slot : slots_) {
    auto word = slot.word_.peek();
    if (Slot::state(word) == Slot::kIdle) {
      ++alive_;
    } else {
      // Its owner was in the middle of using it.
      if (slot.payload.release() && limits_) limits_->forget(slot.bytes_);
      slot.word_.poke(Slot::word(Slot::kEmpty, Slot::kNever));
    }
  }
}

}  // namespace anabranch::runtime
