// Happens-before: a vector clock a stream and a host thread, and everything that joins them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "clock.h"
#include "memory.h"
#include "names.h"

namespace anabranch::race {

struct Thread {
  Clock clock;
  uint32_t component = 0;
  uint64_t version = 1;         // changes whenever `clock` does
  std::vector<uint32_t> locks;  // held now, innermost last
  uint32_t awaiting = kNone;    // a name that this thread awaits and nobody has signalled yet
};

struct Stream {
  Clock clock;
  uint32_t component = 0;
  uint32_t name = kNone;
  int64_t device = 0;
  bool blocking = false;
  bool legacy = false;
  bool declared = false;
  bool dead = false;
  Site destroyed;
  uint32_t merged_into = kNone;       // `alias` made this another stream's second name
  std::vector<uint64_t> thread_seen;  // by thread: the version of its clock that `clock` has joined
};

// The rules of docs/race.md, one function each. Host-side functions take the thread, queueing ones both.
//
// Cost: a queued item whose thread's clock did not change since it last queued on this stream costs O(1); a join costs
// O(streams + threads). An item on the legacy stream joins each blocking stream of its device.
class Order {
 public:
  uint32_t thread(uint32_t name);
  uint32_t stream(uint32_t name);        // made at first use
  uint32_t known_stream(uint32_t name);  // or kNone
  Thread& at_thread(uint32_t id) { return threads_[id]; }
  Stream& at_stream(uint32_t id) { return streams_[id]; }
  uint32_t resolve(uint32_t stream);

  void declare(uint32_t name, bool blocking, int64_t device);
  void alias(uint32_t name, uint32_t of);

  // Orders the next item of `stream` after what `thread` has done and after what the legacy rules demand.
  void enqueue(uint32_t stream, uint32_t thread);
  // A new item on the stream that accesses memory; returns its tick.
  uint64_t stream_item(uint32_t stream) { return tick(streams_[stream].clock, streams_[stream].component); }
  // A new host-side access; returns its tick.
  uint64_t thread_item(uint32_t thread);

  // The stream's next item comes after `clock`.
  void after(uint32_t stream, const Clock& clock) { grow(streams_[stream].clock, clock); }
  // `clock` becomes what the stream's latest item comes after, that item included.
  void snapshot(uint32_t stream, Clock& clock);

  void record(uint32_t event, uint32_t stream);
  bool recorded(uint32_t event) const { return event < events_.size() && events_[event].given; }
  void wait(uint32_t stream, uint32_t event);
  void sync_event(uint32_t thread, uint32_t event);
  void sync_stream(uint32_t thread, uint32_t stream);
  void sync_device(uint32_t thread, int64_t device);
  void unlock(uint32_t lock, uint32_t thread);
  void lock(uint32_t lock, uint32_t thread);
  void start(uint32_t child, uint32_t thread);
  void join(uint32_t child, uint32_t thread);
  void signal(uint32_t name, uint32_t thread);
  void await(uint32_t name, uint32_t thread);

  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()); }
  uint32_t streams() const { return static_cast<uint32_t>(streams_.size()); }
  // What a component stands for: a thread or a stream.
  bool is_thread(uint32_t component) const { return owners_[component] >> 31 != 0; }

 private:
  struct Mark {
    Clock clock;
    bool given = false;
  };
  struct Signal {
    Clock clock;
    bool given = false;
    std::vector<uint32_t> waiters;
  };

  uint32_t component(bool thread);
  uint32_t fresh_stream(uint32_t name);
  void join_thread(uint32_t thread, const Clock& clock);
  bool grow(Clock& clock, const Clock& other);
  uint64_t tick(Clock& clock, uint32_t component);
  // Accounts for clocks that grew; throws Malformed when clocks alone would take more than 1 GiB.
  void charge(size_t words);
  template <typename T>
  static T& at(std::vector<T>& items, uint32_t index) {
    if (index >= items.size()) items.resize(index + 1);
    return items[index];
  }

  std::vector<Thread> threads_;
  std::vector<Stream> streams_;
  std::vector<uint32_t> thread_of_name_;
  std::vector<uint32_t> stream_of_name_;
  std::vector<Mark> events_;
  std::vector<Clock> locks_;
  std::vector<Signal> signals_;
  std::vector<uint32_t> blocking_;  // streams declared blocking
  std::vector<uint32_t> owners_;    // by component
  uint32_t legacy_ = kNone;
  uint64_t clock_words_ = 0;

 public:
  uint32_t legacy_name = kNone;  // the name `legacy`, interned by the owner of the names
};

}  // namespace anabranch::race
