#include "detector.h"

#include <algorithm>

namespace anabranch::race {

namespace {

constexpr uint64_t kMostBytes = uint64_t{1} << 62;

bool blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

// "a[0:8]" -> "a", 0, 8. Brackets in a buffer's name are for ranges only.
std::string_view split(std::string_view text, uint64_t& start, uint64_t& stop) {
  start = 0;
  stop = kEnd;
  if (text.empty()) throw Malformed("expected a buffer's name, found an empty string");
  const size_t open = text.find_first_of("[]");
  if (open == std::string_view::npos) return text;
  const auto wrong = [&]() -> Malformed {
    return Malformed("expected a buffer like \"a\" or \"a[0:8]\" (start <= stop, bytes), found \"" + std::string(text) +
                     "\"");
  };
  if (open == 0 || text[open] != '[' || text.back() != ']') throw wrong();
  const std::string_view inside = text.substr(open + 1, text.size() - open - 2);
  const size_t colon = inside.find(':');
  if (colon == std::string_view::npos) throw wrong();
  const auto whole = [&](std::string_view digits) {
    if (digits.empty() || digits.size() > 19) throw wrong();
    uint64_t value = 0;
    for (const char c : digits) {
      if (c < '0' || c > '9') throw wrong();
      value = value * 10 + static_cast<uint64_t>(c - '0');
    }
    if (value > kMostBytes) throw wrong();
    return value;
  };
  start = whole(inside.substr(0, colon));
  stop = whole(inside.substr(colon + 1));
  if (start > stop) throw wrong();
  return text.substr(0, open);
}

}  // namespace

Detector::Detector(uint64_t report_limit) : report_limit_(report_limit) {
  order_.legacy_name = stream_names_.intern("legacy");
}

void Detector::feed(std::string_view line) {
  ++line_;
  if (line_ == 1 && line.substr(0, 3) == "\xef\xbb\xbf") line.remove_prefix(3);  // a byte order mark
  if (blank(line)) return;
  parser_.parse(line, event_);
  const std::string_view kind = text(Key::kDo);
  const std::string_view thread = optional_text(Key::kThread, "T0");
  const std::string_view source = optional_text(Key::kSource, "");
  const uint32_t name = thread_names_.intern(thread);
  thread_ = order_.thread(name);
  site_.line = line_;
  site_.thread = name;
  site_.source = source.empty() ? kNone : sources_.intern(source);
  dispatch(kind);
  ++events_;
}

void Detector::expected(Key key, const char* what) const {
  throw Malformed(std::string("expected \"") + name_of(key) + "\" to be " + what + " in \"" +
                  std::string(event_[Key::kDo].text) + "\", found " + event_[key].what);
}

std::string_view Detector::text(Key key) const {
  const Field& field = event_[key];
  if (field.type == Type::kString && !field.text.empty()) return field.text;
  if (key == Key::kDo) throw Malformed(std::string("expected \"do\" to name an event, found ") + field.what);
  expected(key, "a name");
}

std::string_view Detector::optional_text(Key key, std::string_view fallback) const {
  const Field& field = event_[key];
  if (field.type == Type::kAbsent || field.type == Type::kNull) return fallback;
  return text(key);
}

int64_t Detector::device() const {
  const Field& field = event_[Key::kDevice];
  if (field.type != Type::kInteger || field.number < 0) expected(Key::kDevice, "a whole number from 0");
  return field.number;
}

// Parses every item before any name is looked up, so a bad one leaves nothing behind.
void Detector::ranges(Key key, bool write, std::vector<Range>& out) {
  const Field& field = event_[key];
  if (field.type != Type::kStrings) expected(key, "a list of buffer names (it may be empty)");
  out.clear();
  for (uint32_t i = 0; i < field.count; ++i) {
    Range range;
    const std::string_view name = split(event_.items[field.first + i], range.start, range.stop);
    range.write = write;
    range.instance = buffer_names_.intern(name);  // a name until resolve turns it into what the name means
    out.push_back(range);
  }
}

// A call on a part of a buffer (`x[0:8].record_stream(s)`) is a call on its whole block.
uint32_t Detector::buffer(Key key) {
  uint64_t start, stop;
  return buffer_names_.intern(split(text(key), start, stop));
}

void Detector::dispatch(std::string_view kind) {
  Thread& me = order_.at_thread(thread_);
  const uint32_t awaiting = me.awaiting;
  me.awaiting = kNone;  // it goes on, so nothing that it called blocks any more
  try {
    if (kind == "op") return on_op();
    if (kind == "record") return on_record();
    if (kind == "wait") return on_wait();
    if (kind == "alloc") return on_alloc();
    if (kind == "free") return on_free();
    if (kind == "record_stream") return on_record_stream();
    if (kind == "replay") return on_replay();
    if (kind == "host") return on_host();
    if (kind == "sync") return on_sync();
    if (kind == "lock") return order_.lock(lock_names_.intern(text(Key::kLock)), thread_);
    if (kind == "unlock") return order_.unlock(lock_names_.intern(text(Key::kLock)), thread_);
    if (kind == "signal") return order_.signal(signal_names_.intern(text(Key::kOn)), thread_);
    if (kind == "await") return order_.await(signal_names_.intern(text(Key::kOn)), thread_);
    if (kind == "start") return order_.start(order_.thread(thread_names_.intern(text(Key::kOf))), thread_);
    if (kind == "join") return order_.join(order_.thread(thread_names_.intern(text(Key::kOf))), thread_);
    if (kind == "graph") return on_graph();
    if (kind == "stream") return on_stream();
    if (kind == "alias") return on_alias();
    if (kind == "unsafe_call") return on_unsafe_call();
    if (kind == "begin_capture") return on_begin_capture();
    if (kind == "end_capture") return on_end_capture();
    if (kind == "destroy") return on_destroy();
    throw Malformed(
        "expected \"do\" to be one of stream, alias, op, graph, replay, host, record, wait, sync, alloc, free, "
        "record_stream, lock, unlock, start, join, signal, await, begin_capture, end_capture, unsafe_call, destroy; "
        "found \"" +
        std::string(kind.substr(0, 60)) + "\"");
  } catch (const Malformed&) {
    order_.at_thread(thread_).awaiting = awaiting;
    throw;
  }
}

void Detector::on_stream() {
  const std::string_view name = text(Key::kStream);
  const std::string_view kind = optional_text(Key::kKind, "nonblocking");
  if (kind != "nonblocking" && kind != "blocking") expected(Key::kKind, "\"nonblocking\" or \"blocking\"");
  const Type given = event_[Key::kDevice].type;
  const int64_t on = given == Type::kAbsent || given == Type::kNull ? 0 : device();
  order_.declare(stream_names_.intern(name), kind == "blocking", on);
}

void Detector::on_alias() {
  const std::string_view name = text(Key::kStream);
  const std::string_view of = text(Key::kOf);
  order_.alias(stream_names_.intern(name), stream_names_.intern(of));
}

// What this event's thread issues: where it stands, and the innermost lock held there.
Actor Detector::issued(Via via) {
  Actor actor;
  actor.site = site_;
  actor.via = via;
  const std::vector<uint32_t>& locks = order_.at_thread(thread_).locks;
  actor.lock = locks.empty() ? kNone : locks.back();
  return actor;
}

// The stream that `name` means, with its next item ordered; reports a dead handle.
uint32_t Detector::queue(uint32_t name, const char* what) {
  const uint32_t stream = order_.stream(name);
  const Stream& s = order_.at_stream(stream);
  if (s.dead) stale("dead-stream", s.destroyed, kNone, name, what, nullptr, kNone);
  order_.enqueue(stream, thread_);
  return stream;
}

void Detector::on_op() {
  const std::string_view on = text(Key::kStream);
  ranges(Key::kReads, false, reads_);
  ranges(Key::kWrites, true, writes_);
  Actor actor = issued(Via::kOp);
  actor.stream = stream_names_.intern(on);
  const uint32_t stream = queue(actor.stream, "op");
  actor.tick = order_.stream_item(stream);
  actor.component = order_.at_stream(stream).component;
  accesses(actor, order_.at_stream(stream).clock);
}

void Detector::on_host() {
  ranges(Key::kReads, false, reads_);
  ranges(Key::kWrites, true, writes_);
  Actor actor = issued(Via::kHost);
  actor.tick = order_.thread_item(thread_);
  actor.component = order_.at_thread(thread_).component;
  accesses(actor, order_.at_thread(thread_).clock);
}

void Detector::on_graph() {
  const std::string_view name = text(Key::kGraph);
  ranges(Key::kReads, false, reads_);
  ranges(Key::kWrites, true, writes_);
  const uint32_t id = graph_names_.intern(name);
  if (id >= graphs_.size()) graphs_.resize(id + 1);
  // Given again, the graph has new addresses and is still the same graph: its launches stay ordered.
  Graph& graph = graphs_[id];
  for (std::vector<Range>* list : {&reads_, &writes_}) {
    for (Range& range : *list) {
      // Addresses are baked in now: what the name comes to mean later does not matter.
      range.instance = memory_.current(range.instance, site_);
      memory_.hold(range.instance);
    }
  }
  for (const std::vector<Range>* list : {&graph.reads, &graph.writes}) {
    for (const Range& range : *list) memory_.let_go(range.instance);
  }
  graph.reads = reads_;
  graph.writes = writes_;
}

void Detector::on_replay() {
  const std::string_view name = text(Key::kGraph);
  const std::string_view on = text(Key::kStream);
  const uint32_t id = graph_names_.intern(name);
  if (id >= graphs_.size()) graphs_.resize(id + 1);
  Actor actor = issued(Via::kReplay);
  actor.graph = id;
  actor.stream = stream_names_.intern(on);
  const uint32_t stream = queue(actor.stream, "replay");
  order_.after(stream, graphs_[id].clock);
  actor.tick = order_.stream_item(stream);
  actor.component = order_.at_stream(stream).component;
  Graph& graph = graphs_[id];
  for (const std::vector<Range>* list : {&graph.reads, &graph.writes}) {
    for (const Range& range : *list) access(range, actor, order_.at_stream(stream).clock);
  }
  order_.snapshot(stream, graph.clock);
}

void Detector::on_record() {
  const std::string_view event = text(Key::kEvent);
  const uint32_t name = stream_names_.intern(text(Key::kStream));
  const uint32_t stream = queue(name, "record");
  order_.record(event_names_.intern(event), stream);
}

void Detector::on_wait() {
  const std::string_view event = text(Key::kEvent);
  const uint32_t name = stream_names_.intern(text(Key::kStream));
  const uint32_t id = event_names_.intern(event);
  if (!order_.recorded(id)) {
    // No effect, not even the order of a queued item; only a dead handle is still one.
    const Stream& s = order_.at_stream(order_.stream(name));
    if (s.dead) stale("dead-stream", s.destroyed, kNone, name, "wait", nullptr, kNone);
    return;
  }
  order_.wait(queue(name, "wait"), id);
}

void Detector::on_sync() {
  const Type on = event_[Key::kOn].type;
  const Type dev = event_[Key::kDevice].type;
  const bool by_name = on != Type::kAbsent && on != Type::kNull;
  const bool by_device = dev != Type::kAbsent && dev != Type::kNull;
  if (by_name == by_device) {
    throw Malformed(std::string("expected either \"on\" (a stream or an event) or \"device\" in \"sync\", found ") +
                    (by_name ? "both" : "neither"));
  }
  if (by_device) return order_.sync_device(thread_, device());
  const std::string_view name = text(Key::kOn);
  const uint32_t event = event_names_.find(name);
  const uint32_t stream_name = stream_names_.find(name);
  // A name that is both an event and a stream: the sync is taken to cover both.
  if (event != kNone) order_.sync_event(thread_, event);
  const uint32_t stream = stream_name == kNone ? kNone : order_.known_stream(stream_name);
  if (stream == kNone) {
    // The legacy stream is there from the start and covers the blocking ones, even if nothing was queued on it.
    if (name == "legacy" && event == kNone) order_.sync_stream(thread_, order_.stream(order_.legacy_name));
    return;
  }
  const Stream& s = order_.at_stream(stream);
  if (s.dead && event == kNone) stale("dead-stream", s.destroyed, kNone, stream_name, "sync", nullptr, kNone);
  order_.sync_stream(thread_, stream);
}

void Detector::on_alloc() {
  uint64_t start, stop;
  if (event_[Key::kStream].type == Type::kAbsent) expected(Key::kStream, "a stream's name, or null for host memory");
  const std::string_view stream = optional_text(Key::kStream, "");
  const std::string_view reuses = optional_text(Key::kReuses, "");
  const uint32_t name = buffer(Key::kBuffer);
  const uint32_t on = stream.empty() ? kNone : stream_names_.intern(stream);
  if (reuses.empty()) {
    memory_.alloc(name, on, site_, nullptr);
    return;
  }
  const std::string_view base = split(reuses, start, stop);
  Range reused;
  reused.instance = memory_.current(buffer_names_.intern(base), site_);
  reused.start = start;
  reused.stop = stop;
  memory_.alloc(name, on, site_, &reused);
}

void Detector::on_free() {
  const uint32_t name = buffer(Key::kBuffer);
  const uint32_t id = memory_.current(name, site_);
  if (memory_[id].freed) {
    stale("double-free", memory_[id].free, name, kNone, "free", nullptr, id);
    return;
  }
  // Reuse of the block waits for what the freeing thread knows to be done, and for what is queued by now on the
  // streams that record_stream named: the allocator records an event on each.
  std::vector<const Clock*> clocks;
  const std::vector<uint32_t> recorded = memory_[id].recorded;
  for (const uint32_t given : recorded) {
    const uint32_t stream = order_.resolve(given);
    const Stream& s = order_.at_stream(stream);
    if (s.dead) stale("dead-stream-free", s.destroyed, name, s.name, "free", nullptr, id);
    clocks.push_back(&s.clock);
  }
  clocks.push_back(&order_.at_thread(thread_).clock);
  memory_.free(id, site_, clocks);
}

void Detector::on_record_stream() {
  const uint32_t name = buffer(Key::kBuffer);
  const uint32_t on = stream_names_.intern(text(Key::kStream));
  const uint32_t stream = order_.stream(on);
  const uint32_t id = memory_.current(name, site_);
  if (memory_[id].freed) {
    stale("record-after-free", memory_[id].free, name, on, "record_stream", nullptr, id);
    return;
  }
  std::vector<uint32_t>& recorded = memory_[id].recorded;
  if (std::find(recorded.begin(), recorded.end(), stream) == recorded.end()) recorded.push_back(stream);
}

void Detector::on_destroy() {
  const uint32_t name = stream_names_.intern(text(Key::kStream));
  const uint32_t stream = order_.stream(name);
  Stream& s = order_.at_stream(stream);
  if (s.dead) {
    stale("double-destroy", s.destroyed, kNone, name, "destroy", nullptr, kNone);
    return;
  }
  s.dead = true;  // what is queued still runs; the handle is gone
  s.destroyed = site_;
}

void Detector::accesses(const Actor& actor, const Clock& clock) {
  for (std::vector<Range>* list : {&reads_, &writes_}) {
    for (Range& range : *list) {
      range.instance = memory_.current(range.instance, site_);
      access(range, actor, clock);
    }
  }
}

void Detector::access(const Range& range, const Actor& actor, const Clock& clock) {
  if (range.empty()) return;  // touches nothing
  const Instance& instance = memory_[range.instance];
  if (instance.freed) {
    stale(actor.via == Via::kReplay ? "replay-after-free" : "use-after-free", instance.free, instance.name,
          actor.stream, range.write ? "write" : "read", &actor, range.instance);
  }
  conflicts_.clear();
  memory_.touch(range, actor, clock, conflicts_);
  for (const Conflict& conflict : conflicts_) race(conflict, range, actor, clock);
}

}  // namespace anabranch::race
