// Captures in progress, and the calls that one must not meet: unsafe calls of other threads, while it is global.
#include "detector.h"

namespace anabranch::race {

void Detector::on_begin_capture() {
  const uint32_t name = stream_names_.intern(text(Key::kStream));
  const std::string_view mode = text(Key::kMode);
  if (mode != "global" && mode != "thread_local" && mode != "relaxed") {
    expected(Key::kMode, "\"global\", \"thread_local\" or \"relaxed\"");
  }
  Capture capture;
  capture.stream = order_.stream(name);
  capture.stream_name = name;
  capture.owner = thread_;
  capture.global = mode == "global";
  capture.site = site_;
  const Stream& s = order_.at_stream(capture.stream);
  if (s.dead) stale("dead-stream", s.destroyed, kNone, name, "begin_capture", nullptr, kNone);
  order_.thread_item(thread_);
  const Clock& clock = order_.at_thread(thread_).clock;
  if (capture.global) {
    for (const Unsafe& call : unsafe_) {
      if (call.owner == thread_ || clock.covers(order_.at_thread(call.owner).component, call.tick)) continue;
      capture_race(capture, call, false);
    }
  }
  for (Capture& open : captures_) {
    if (order_.resolve(open.stream) == capture.stream && open.owner == thread_) {
      open = capture;
      return;
    }
  }
  captures_.push_back(capture);
}

void Detector::on_end_capture() {
  const uint32_t stream = order_.stream(stream_names_.intern(text(Key::kStream)));
  // The capture on that stream, this thread's own first; an end without a begin has no effect.
  auto found = captures_.end();
  for (auto open = captures_.begin(); open != captures_.end(); ++open) {
    if (order_.resolve(open->stream) != stream) continue;
    if (found == captures_.end() || open->owner == thread_) found = open;
  }
  if (found == captures_.end()) return;
  Ended ended;
  ended.capture = *found;
  captures_.erase(found);
  ended.tick = order_.thread_item(thread_);
  ended.component = order_.at_thread(thread_).component;
  if (!ended.capture.global) return;
  for (Ended& before : ended_) {
    if (before.capture.owner == ended.capture.owner && before.component == ended.component) {
      before = ended;
      return;
    }
  }
  ended_.push_back(ended);
}

void Detector::on_unsafe_call() {
  Unsafe call;
  call.owner = thread_;
  call.tick = order_.thread_item(thread_);
  call.site = site_;
  const Clock& clock = order_.at_thread(thread_).clock;
  int found = 0;
  for (const Capture& open : captures_) {
    if (!open.global || open.owner == thread_) continue;
    capture_race(open, call, true);
    if (++found == 16) break;  // a trace with more captures in progress has been told enough
  }
  for (const Ended& ended : ended_) {
    if (ended.capture.owner == thread_ || clock.covers(ended.component, ended.tick)) continue;
    capture_race(ended.capture, call, true);
  }
  for (Unsafe& before : unsafe_) {
    if (before.owner == thread_) {
      before = call;
      return;
    }
  }
  unsafe_.push_back(call);
}

}  // namespace anabranch::race
