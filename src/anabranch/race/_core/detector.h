// Judges a trace event by event: order, then accesses, then a report for what is unordered or already released.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "event.h"
#include "memory.h"
#include "names.h"
#include "order.h"

namespace anabranch::race {

class Detector {
 public:
  explicit Detector(uint64_t report_limit);

  // One line of a trace; a blank one is skipped. Throws Malformed and leaves the order and the memory as they were.
  void feed(std::string_view line);

  uint64_t line() const { return line_; }
  uint64_t races() const { return races_; }
  uint64_t stales() const { return stales_; }
  uint64_t reported() const { return reports_.size(); }
  const std::string& report(size_t index) const { return reports_[index]; }
  std::string summary() const;

 private:
  struct Graph {
    std::vector<Range> reads;
    std::vector<Range> writes;
    Clock clock;  // of its latest launch
  };
  struct Capture {
    uint32_t stream = kNone;
    uint32_t owner = kNone;  // thread
    bool global = false;
    Site site;
    uint32_t stream_name = kNone;
  };
  struct Ended {
    Capture capture;
    uint32_t component = 0;  // of the thread that ended it
    uint64_t tick = 0;
  };
  struct Unsafe {
    uint32_t owner = kNone;
    uint64_t tick = 0;
    Site site;
  };

  // Fields, checked.
  std::string_view text(Key key) const;
  std::string_view optional_text(Key key, std::string_view fallback) const;
  int64_t device() const;
  void ranges(Key key, bool write, std::vector<Range>& out);
  uint32_t buffer(Key key);
  [[noreturn]] void expected(Key key, const char* what) const;

  // Events.
  void dispatch(std::string_view kind);
  void on_stream();
  void on_alias();
  void on_op();
  void on_graph();
  void on_replay();
  void on_host();
  void on_record();
  void on_wait();
  void on_sync();
  void on_alloc();
  void on_free();
  void on_record_stream();
  void on_begin_capture();
  void on_end_capture();
  void on_unsafe_call();
  void on_destroy();

  Actor issued(Via via);
  uint32_t queue(uint32_t name, const char* what);
  void accesses(const Actor& actor, const Clock& clock);  // to reads_ and writes_
  void access(const Range& range, const Actor& actor, const Clock& clock);

  // Reports.
  void race(const Conflict& conflict, const Range& range, const Actor& actor, const Clock& clock);
  void capture_race(const Capture& capture, const Unsafe& call, bool capture_first);
  void stale(const char* kind, const Site& released, uint32_t buffer, uint32_t stream, const char* what,
             const Actor* actor, uint32_t instance);
  bool distinct(uint64_t key);
  uint64_t code(const Site& site) const;
  void put_site(std::string& out, const Site& site) const;
  void put_actor(std::string& out, const Actor& actor, uint32_t buffer, bool write) const;
  void put_origin(std::string& out, uint32_t instance) const;
  void put_name(std::string& out, const Names& names, uint32_t id) const;

  Parser parser_;
  Event event_;
  Site site_;
  uint32_t thread_ = kNone;

  Names thread_names_, stream_names_, event_names_, buffer_names_, graph_names_, lock_names_, signal_names_, sources_;
  Order order_;
  Memory memory_;
  std::vector<Graph> graphs_;
  std::vector<Capture> captures_;  // in progress
  std::vector<Ended> ended_;       // the latest an owner and ending thread: it covers the ones before
  std::vector<Unsafe> unsafe_;     // the latest a thread
  std::vector<Range> reads_, writes_;
  std::vector<Conflict> conflicts_;

  uint64_t line_ = 0;
  uint64_t events_ = 0;
  uint64_t races_ = 0;
  uint64_t stales_ = 0;
  uint64_t unreported_ = 0;
  uint64_t report_limit_;
  std::unordered_set<uint64_t> seen_;
  std::vector<std::string> reports_;
};

void put_json(std::string& out, std::string_view text);

}  // namespace anabranch::race
