// The context pool: gives a call a context that nothing else is using. Nothing here knows PyTorch, Python or a device.
//
// A slot holds one context. One word says whose it is and on which stream it was used last; who changes it from idle to
// taken owns the slot and its context until it gives them back. There are two ways to do so:
//
//   by hint   A thread remembers which slot it had last on a stream. It comes back, changes that slot from "idle, last
//             used on this stream" to taken, and is done: one atomic operation, no lock, and no cache line that other
//             threads write.
//   by lock   Everything else: the pool's lock is taken to look for the best idle slot, or to stand in line.
//
// Who stands in line has marked every slot as wanted, with the lock held. A slot that is wanted never becomes idle: who
// gives it back takes the lock and hands it to the head of the line. So while anybody waits there is no idle slot that
// a thread just coming could take first, those who wait are served in the order in which they came, and none starves.
// Nobody is lost either: giving back and marking change the same word, so one of the two sees the other.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "sync.h"

namespace anabranch::runtime {

// How many contexts and bytes one engine may hold, over all its signatures. Threads: any. No lock: `forget` is called
// by finalizers, which run in the middle of anything.
class Limits {
 public:
  // A `memory_limit` below 0 is none.
  Limits(int64_t max_contexts, int64_t memory_limit);

  // Make room for one more context of about `bytes`; false if a limit forbids it.
  bool reserve(int64_t bytes);
  // Whether `reserve` would succeed now.
  bool has_room(int64_t bytes) const;
  // Correct a reservation to what the context really takes; false if that is over the limit.
  bool confirm(int64_t reserved, int64_t actual);
  // A context of `bytes` is gone, or was not built.
  void forget(int64_t bytes);
  std::pair<int64_t, int64_t> held() const {
    auto held = held_.load("read");
    return {contexts(held), bytes(held)};
  }

  const int64_t max_contexts, memory_limit;

 private:
  // Contexts above, bytes below, in one word: a reservation is made whole or not at all. Made in two steps, one that is
  // refused at the second would meanwhile be in the way of one for which there is room.
  static constexpr int kBits = 48;
  static constexpr int64_t kOne = int64_t{1} << kBits;  // context
  static constexpr int64_t kMost = (int64_t{1} << 15) - 1;
  static int64_t contexts(int64_t held) { return held >> kBits; }
  static int64_t bytes(int64_t held) { return held & (kOne - 1); }
  bool fits(int64_t bytes) const { return bytes < kOne && (memory_limit < 0 || bytes <= memory_limit); }
  bool has_room(int64_t held, int64_t more) const {
    return contexts(held) < max_contexts && contexts(held) < kMost && fits(bytes(held) + more);
  }
  Atomic<int64_t> held_{"held", 0};
};

// What a slot holds: the state of one call in flight.
class Payload {
 public:
  virtual ~Payload() = default;
};

class Slot {
 public:
  static constexpr int64_t kNever = -1;  // a stream that there is not

  enum State { kEmpty, kIdle, kTaken, kWanted };
  // The state, and the stream of the last use.
  static constexpr int64_t word(State state, int64_t stream) {
    return static_cast<int64_t>(static_cast<uint64_t>(stream) << 2 | static_cast<uint64_t>(state));
  }
  static constexpr State state(int64_t word) { return static_cast<State>(word & 3); }
  static constexpr int64_t stream(int64_t word) { return word >> 2; }

  // The owner's alone.
  std::unique_ptr<Payload> payload;

 private:
  friend class Pool;
  Atomic<int64_t> word_{"slot", word(kEmpty, kNever)};
  int64_t bytes_ = 0;  // as counted in the limits
  // When it was given back; only to choose by.
  std::atomic<int64_t> used_at_{0};
};

class Pool {
 public:
  struct Acquired {
    enum Kind {
      kContext,  // `slot` is the caller's
      kRoom,     // build a context: `reserved` bytes are set aside in the limits for it
      kNothing,  // there is no context, and none may be built
    } kind = kNothing;
    Slot* slot = nullptr;
    int64_t reserved = 0;
    bool waits = false;        // last used on another stream, for which the device has to wait
    bool same_stream = false;  // last used on this very stream, as far as numbers tell
  };

  // `limits` must outlive the pool. Null: a pool whose contexts are never lent to another stream, without a limit.
  explicit Pool(Limits* limits);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // An idle context, by preference: last used on `stream`; never used; a new one, if `may_build`; the least recently
  // used. When all are in the hands of other threads, waits for the first that comes back.
  Acquired acquire(int64_t stream, bool may_build);

  // A context that was just built, in its builder's hands; `bytes` is what the next will take.
  Slot* add(std::unique_ptr<Payload> payload, int64_t bytes);
  // Give a slot back, last used on `stream` (kNever: on none that a caller could have).
  void release(Slot* slot, int64_t stream);
  // Give up a slot's context after an error. The caller destroys what it gets.
  [[nodiscard]] std::unique_ptr<Payload> discard(Slot* slot);
  // Take all idle contexts out for good.
  [[nodiscard]] std::vector<std::unique_ptr<Payload>> drain();

  // Bytes of the last context built: what the next will take.
  int64_t estimate();
  // How many contexts there are, in whoever's hands.
  int64_t alive();
  // Every payload there is, for whoever knows that no thread owns a slot, or looks only at what never changes.
  void for_each(const std::function<void(Payload&)>& visit);

  // Take this very slot, if it is idle.
  bool take(Slot* slot);
  // As if no context had been used yet. While there are no callers: who built them has tried them.
  void forget_uses();

  // In a forked child, on its only thread. Contexts in the hands of threads that the child does not have are lost.
  void after_fork();

 private:
  struct Waiter {
    Signal ready{"a context"};
    Slot* slot = nullptr;
  };

  Slot* by_hint(int64_t stream);
  static Acquired taken(Slot* slot, int64_t stream);
  bool change(Slot& slot, int64_t from, Slot::State state);
  void send_away();

  Limits* const limits_;
  const uint64_t serial_;  // of no other pool in this process, ever
  Mutex lock_{"pool"};
  // Guarded by `lock_`. Slots stay where they are for as long as the pool lives, so that hints may point to them.
  std::deque<Slot> slots_;
  std::deque<Waiter*> line_;
  int64_t alive_ = 0;
  int64_t estimate_ = 0;
};

}  // namespace anabranch::runtime
