#include "order.h"

#include <algorithm>

#include "event.h"

namespace anabranch::race {

namespace {

constexpr uint64_t kMostClockWords = uint64_t{1} << 27;  // 1 GiB

}  // namespace

uint32_t Order::component(bool thread) {
  const uint32_t index = thread ? threads() : streams();
  owners_.push_back(thread ? index | 0x80000000u : index);
  return static_cast<uint32_t>(owners_.size() - 1);
}

bool Order::grow(Clock& clock, const Clock& other) {
  if (other.size() > clock.size()) charge(other.size() - clock.size());
  return clock.join(other);
}

uint64_t Order::tick(Clock& clock, uint32_t component) {
  if (component >= clock.size()) charge(component + 1 - clock.size());
  return clock.tick(component);
}

void Order::charge(size_t words) {
  clock_words_ += words;
  if (clock_words_ > kMostClockWords) {
    throw Malformed("expected a trace whose clocks fit in 1 GiB, found " + std::to_string(streams()) + " streams and " +
                    std::to_string(threads()) + " threads with more events than that allows");
  }
}

uint32_t Order::thread(uint32_t name) {
  if (name < thread_of_name_.size() && thread_of_name_[name] != kNone) return thread_of_name_[name];
  if (name >= thread_of_name_.size()) thread_of_name_.resize(name + 1, kNone);
  Thread made;
  made.component = component(true);
  const uint32_t id = threads();
  threads_.push_back(std::move(made));
  thread_of_name_[name] = id;
  return id;
}

uint32_t Order::resolve(uint32_t stream) {
  while (streams_[stream].merged_into != kNone) {
    const uint32_t next = streams_[stream].merged_into;
    if (streams_[next].merged_into != kNone) streams_[stream].merged_into = streams_[next].merged_into;
    stream = next;
  }
  return stream;
}

uint32_t Order::known_stream(uint32_t name) {
  return name < stream_of_name_.size() && stream_of_name_[name] != kNone ? resolve(stream_of_name_[name]) : kNone;
}

uint32_t Order::stream(uint32_t name) {
  const uint32_t known = known_stream(name);
  return known != kNone ? known : fresh_stream(name);
}

uint32_t Order::fresh_stream(uint32_t name) {
  if (name >= stream_of_name_.size()) stream_of_name_.resize(name + 1, kNone);
  Stream made;
  made.component = component(false);
  made.name = name;
  made.legacy = name == legacy_name;
  const uint32_t id = streams();
  streams_.push_back(std::move(made));
  stream_of_name_[name] = id;
  if (streams_[id].legacy) legacy_ = id;
  return id;
}

void Order::declare(uint32_t name, bool blocking, int64_t device) {
  uint32_t id = stream(name);
  // A handle that died can be handed out again: the name then means a new stream, with no order to the old one.
  // The legacy stream is always the same one.
  if (streams_[id].dead && !streams_[id].legacy) id = fresh_stream(name);
  Stream& s = streams_[id];
  s.dead = false;
  s.declared = true;
  s.device = device;
  if (s.legacy) return;  // the legacy stream is what it is, whatever its kind is called
  if (blocking && !s.blocking) blocking_.push_back(id);
  if (!blocking && s.blocking) blocking_.erase(std::find(blocking_.begin(), blocking_.end(), id));
  s.blocking = blocking;
}

void Order::alias(uint32_t name, uint32_t of) {
  const uint32_t target = stream(of);
  const uint32_t known = known_stream(name);
  if (known == target) return;
  if (name >= stream_of_name_.size()) stream_of_name_.resize(name + 1, kNone);
  const bool legacy = name == legacy_name || (known != kNone && streams_[known].legacy);
  if (known == kNone || streams_[known].dead) {
    stream_of_name_[name] = target;
  } else {
    // Both names were in use: they are one stream from here on.
    Stream& other = streams_[known];
    Stream& s = streams_[target];
    grow(s.clock, other.clock);
    other.merged_into = target;
    if (other.declared && !s.declared) {
      s.declared = true;
      s.device = other.device;
      s.blocking = other.blocking && !s.legacy;
      if (s.blocking) blocking_.push_back(target);
    }
    if (other.blocking) blocking_.erase(std::find(blocking_.begin(), blocking_.end(), known));
    other.blocking = false;
  }
  if (!legacy) return;
  Stream& s = streams_[target];
  if (s.blocking) blocking_.erase(std::find(blocking_.begin(), blocking_.end(), target));
  s.blocking = false;
  s.legacy = true;
  legacy_ = target;
}

void Order::enqueue(uint32_t stream, uint32_t thread) {
  Stream& s = streams_[stream];
  const Thread& t = threads_[thread];
  if (thread >= s.thread_seen.size()) {
    charge(thread + 1 - s.thread_seen.size());
    s.thread_seen.resize(thread + 1, 0);
  }
  uint64_t& seen = s.thread_seen[thread];
  if (seen != t.version) {
    grow(s.clock, t.clock);
    seen = t.version;
  }
  if (s.legacy) {
    for (const uint32_t b : blocking_) {
      if (streams_[b].device == s.device) grow(s.clock, streams_[b].clock);
    }
  } else if (s.blocking && legacy_ != kNone && streams_[legacy_].device == s.device) {
    grow(s.clock, streams_[legacy_].clock);
  }
}

uint64_t Order::thread_item(uint32_t thread) {
  Thread& t = threads_[thread];
  ++t.version;
  return tick(t.clock, t.component);
}

void Order::join_thread(uint32_t thread, const Clock& clock) {
  Thread& t = threads_[thread];
  if (grow(t.clock, clock)) ++t.version;
}

void Order::record(uint32_t event, uint32_t stream) {
  // A record replaces the one before it: later waits bind to this one, waits that were queued keep theirs.
  Mark& mark = at(events_, event);
  mark.given = true;
  snapshot(stream, mark.clock);
}

void Order::snapshot(uint32_t stream, Clock& clock) {
  clock_words_ -= clock.size();
  clock.clear();
  grow(clock, streams_[stream].clock);
}

void Order::wait(uint32_t stream, uint32_t event) {
  if (recorded(event)) grow(streams_[stream].clock, events_[event].clock);
}

void Order::sync_event(uint32_t thread, uint32_t event) {
  if (recorded(event)) join_thread(thread, events_[event].clock);
}

void Order::sync_stream(uint32_t thread, uint32_t stream) {
  const Stream& s = streams_[stream];
  join_thread(thread, s.clock);
  // A synchronize is held to the same implicit order as queued work.
  if (s.legacy) {
    for (const uint32_t b : blocking_) {
      if (streams_[b].device == s.device) join_thread(thread, streams_[b].clock);
    }
  } else if (s.blocking && legacy_ != kNone && streams_[legacy_].device == s.device) {
    join_thread(thread, streams_[legacy_].clock);
  }
}

void Order::sync_device(uint32_t thread, int64_t device) {
  for (const Stream& s : streams_) {
    if (s.device == device && s.merged_into == kNone) join_thread(thread, s.clock);
  }
}

void Order::unlock(uint32_t lock, uint32_t thread) {
  std::vector<uint32_t>& held = threads_[thread].locks;
  const auto found = std::find(held.rbegin(), held.rend(), lock);
  if (found != held.rend()) held.erase(std::next(found).base());
  grow(at(locks_, lock), threads_[thread].clock);
}

void Order::lock(uint32_t lock, uint32_t thread) {
  std::vector<uint32_t>& held = threads_[thread].locks;
  if (held.size() < 64) held.push_back(lock);  // only reports use the list: a runaway trace need not be remembered
  join_thread(thread, at(locks_, lock));
}

void Order::start(uint32_t child, uint32_t thread) {
  join_thread(child, threads_[thread].clock);
}

void Order::join(uint32_t child, uint32_t thread) {
  join_thread(thread, threads_[child].clock);
}

void Order::signal(uint32_t name, uint32_t thread) {
  Signal& s = at(signals_, name);
  grow(s.clock, threads_[thread].clock);
  s.given = true;
  for (const uint32_t waiter : s.waiters) {
    if (threads_[waiter].awaiting != name) continue;
    threads_[waiter].awaiting = kNone;
    join_thread(waiter, s.clock);
  }
  s.waiters.clear();
}

void Order::await(uint32_t name, uint32_t thread) {
  Signal& s = at(signals_, name);
  if (s.given) {
    join_thread(thread, s.clock);
    return;
  }
  // The call was issued before the signal: it blocks, and the thread's next event comes after the signal.
  threads_[thread].awaiting = name;
  if (std::find(s.waiters.begin(), s.waiters.end(), thread) == s.waiters.end()) s.waiters.push_back(thread);
}

}  // namespace anabranch::race
