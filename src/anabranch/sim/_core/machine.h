// The simulated machine: streams as queues of pending work, a stream-ordered caching allocator, captures and graphs.
//
// Nothing that is queued runs until somebody steps the machine: the explorer's conductor, one head at a time, or (in
// threads that are not controlled) a host thread that waits, by a built-in policy. Work is a closure over *addresses*;
// it owns no device memory, or a use after free would go unseen.
//
// Threads: any. `mutex` guards everything here. It is never waited for with the GIL held (`Lock`), because running
// queued work may need the GIL, and it is not held while a controlled thread waits for its turn (`point`).
#pragma once

#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <unordered_set>
#include <vector>

namespace anabranch::sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
// NaN as float16, bfloat16, float32 and float64; 32765 as int16.
constexpr uint16_t kPoison = 0x7FFD;

// What one step touches, for the search's reduction; the rules are in explore/_dependence.py.
enum Mode { kRead, kWrite, kAdd, kGive, kNeed, kAcquire, kRelease, kHostAsync, kHost };
struct Touch {
  std::string key;
  int64_t lo = 0, hi = 1;
  int mode = kRead;
};
using Touches = std::vector<Touch>;

// Device memory [lo, hi) that queued work reads or writes.
struct Range {
  uintptr_t lo, hi;
  bool write;
};

struct Queue;
struct Capture;
struct Graph;

// Counts what one thread creates. Names are made from the thread's index and these, so that equivalent interleavings
// give the same names.
struct Ids {
  uint64_t index = 0, block = 0, event = 0, op = 0, stream = 0, graph = 0;
};

// All that was queued on `queue` up to its `count`-th item has run. `op` names that item.
struct Dep {
  std::shared_ptr<Queue> queue;
  uint64_t count = 0;
  std::string op;
};
using Deps = std::vector<Dep>;

// A place inside a capture: the first `count` nodes of a lane.
struct Place {
  int lane;
  size_t count;
};

struct Op {
  std::string id, name;
  std::string giver;  // the id under which it was queued: its own, or its graph launch's
  std::vector<Range> ranges;
  std::function<void()> run;
  bool poison = false;      // the allocator's own, not the program's
  bool host_async = false;  // touches pinned host memory, which the host may touch at any time
  Deps deps;
  uint64_t serial = 0;
};

struct Queue {
  enum Kind { kLegacy, kBlocking, kNonblocking, kLane, kLatch } kind;
  int64_t id = 0;
  int device = 0;
  std::string actor;  // its name as an actor and in traces
  std::deque<Op> ops;
  uint64_t pushed = 0, executed = 0;
  std::string last;  // the id of the last item pushed
  std::string trace_name() const { return kind == kLegacy && device == 0 ? "legacy" : actor; }
  Deps waits;  // what the next item waits for
  std::shared_ptr<Capture> capture;
  int lane = 0;
};
using QueuePtr = std::shared_ptr<Queue>;

struct Node {
  int lane;
  Op op;
  std::vector<Place> deps;
};

// A capture under way.
struct Capture {
  enum class CaptureMode { kGlobal, kThreadLocal, kRelaxed } mode = CaptureMode::kThreadLocal;
  int64_t id = 0;
  const void* thread = nullptr;  // see this_thread()
  QueuePtr origin;
  std::vector<Node> nodes;
  std::vector<size_t> counts;             // nodes of each lane
  std::vector<std::vector<Place>> waits;  // what the next node of each lane waits for
  std::vector<QueuePtr> joined;           // the stream of each lane
  std::string invalid;                    // why it can no longer succeed
  std::string trace;                      // what it did, as a trace of its own
  std::vector<std::function<void()>> on_destroy;
};

struct Graph {
  std::string id;
  std::vector<Node> nodes;
  size_t lanes = 1;
  Deps last_launch;  // the launches of one graph are ordered
  std::vector<std::function<void()>> on_destroy;
};

struct Event {
  std::string id;
  bool recorded = false;
  Deps deps;
  std::shared_ptr<Capture> capture;
  std::vector<Place> inside;
};

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
  std::string id;    // of the memory
  std::string name;  // of the allocation that has it now, or had it last
  int device = 0;
  int64_t pool = 0, stream = 0;
  bool live = false;
  std::shared_ptr<Capture> capture;  // the capture that it was allocated in, while that lasts
  std::vector<QueuePtr> others;      // record_stream
  Deps pending;                      // what must have run before it may be handed out again
};

class Machine {
 public:
  static Machine& get();

  std::recursive_mutex mutex;

  // -- streams ---------------------------------------------------------------------------------------------------
  QueuePtr queue(int device, int64_t stream);
  QueuePtr new_stream(int device, bool blocking);
  std::vector<QueuePtr> queues();

  // -- queueing; each is preceded by a point ---------------------------------------------------------------------
  // `workspace`: the op uses its stream's hidden workspace (cuBLAS, cuDNN), as a first item that writes it and a
  // second that checks it: what came in between is an output full of poison.
  void launch(const QueuePtr& queue, Op op, bool workspace = false);
  void record(Event& event, const QueuePtr& queue);
  void wait(const Event& event, const QueuePtr& queue);
  std::shared_ptr<Graph> end_capture(const QueuePtr& queue);
  void begin_capture(const QueuePtr& queue, Capture::CaptureMode mode);
  void abort_capture(const QueuePtr& queue);
  void open_latch(int64_t latch);
  int64_t new_latch();
  void hold(int64_t latch, const QueuePtr& queue);
  void launch_graph(const std::shared_ptr<Graph>& graph, const QueuePtr& queue);
  void load_workspace(const QueuePtr& queue);
  void trace_graph(const Graph& graph);

  // -- waiting ---------------------------------------------------------------------------------------------------
  Deps frontier(const QueuePtr& queue);
  Deps frontier(int device);
  static bool done(const Deps& deps);
  // Runs one item by the free-mode policy; false if nothing can run.
  bool advance(const Deps& towards);
  // Whether an item with this id is queued and has not run.
  bool pending(const std::string& op) const { return pending_.count(op) != 0; }

  // -- stepping --------------------------------------------------------------------------------------------------
  bool runnable(const Queue& queue) const;
  Touches touches(const Queue& queue) const;  // of its head
  void step(const QueuePtr& queue);

  // -- memory ----------------------------------------------------------------------------------------------------
  Block* allocate(size_t bytes, const QueuePtr& queue, int64_t pool, const std::string& name = "");
  void release(void* data);
  void record_stream(void* data, const QueuePtr& queue);
  Block* block_of(uintptr_t address);
  Touches allocation_touches(size_t bytes, const QueuePtr& queue, int64_t pool);
  static std::string pool_key(int device, int64_t pool, int64_t stream);
  int64_t pool_bytes(int64_t pool);
  int64_t reserved(int device), allocated(int device);
  void trim(int64_t pool);

  // -- the trace -------------------------------------------------------------------------------------------------
  bool tracing = false;
  std::string trace;
  std::vector<std::string> capture_traces;
  void emit(const std::string& line) { trace += line, trace += '\n'; }

  void fail_if_lost();
  void reset();

  std::string policy = "fifo";
  std::mt19937_64 random{0};
  std::string error;  // the first error of queued work; lasts
  // Planted faults, by kind: the `after`-th call of that kind from here on fails, and `times` - 1 more.
  struct Fault {
    int64_t after, times;
  };
  std::map<std::string, Fault> faults;
  void fault(const std::string& kind);
  // How often a host thread waited for the device or asked it, and how many events there are.
  std::atomic<int64_t> asked{0}, events{0};
  int64_t limit[kDevices] = {0, 0};  // bytes; 0: none
  int64_t next_pool = 1;

  std::map<int64_t, std::shared_ptr<Graph>> graphs;
  std::map<int64_t, QueuePtr> latches;
  std::vector<std::shared_ptr<Capture>> captures;
  int64_t next_handle = 1;

 private:
  Machine();
  void push(const QueuePtr& queue, Op op);
  void push_real(const QueuePtr& queue, Op op);
  void poison(Block& block, const QueuePtr& queue);
  bool need(const Deps& deps);
  void trace_op(const Op& op, const QueuePtr& queue);
  void log(const QueuePtr& queue, const std::string& line);
  std::string describe(const std::vector<Range>& ranges, bool write);
  Block* workspace(const QueuePtr& queue);

  std::map<std::pair<int, int64_t>, QueuePtr> streams_;
  std::vector<QueuePtr> lanes_;  // of graphs that were launched, until they have run
  std::map<uintptr_t, std::unique_ptr<Block>> blocks_;
  std::map<std::tuple<int, int64_t, int64_t>, std::vector<Block*>> cached_;  // by device, pool, stream
  std::map<std::pair<int, int64_t>, Block*> workspaces_;
  std::unordered_set<std::string> pending_;
  uint64_t serial_ = 0;
  int64_t next_capture_ = 1;
};

void add(Deps& deps, const Dep& dep);
void add(Deps& deps, const Deps& more);

// The calling thread's counters, and whether it is controlled.
Ids& ids();
// Something that is another thing in each thread.
const void* this_thread();
bool controlled();
std::string make_id(uint64_t Ids::* counter);

// Called by a controlled thread before it does something that others may observe: who goes on is decided in here. The
// caller holds neither the machine's mutex nor (necessarily) the GIL. Does nothing in other threads.
void point(const char* kind, const std::function<std::string()>& label, const std::function<Touches()>& touches,
           const std::vector<std::string>& needs = {});
// Adds what the step turned out to touch.
void amend(const Touches& touches);
// Where in the user's program the calling thread is: "file.py:12"; empty when nobody traces.
std::string source();
std::string thread_name();

// The machine's mutex, without ever waiting for it while holding the GIL.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

// The calling thread's current device and streams.
int current_device();
int exchange_device(int device);
QueuePtr current_queue(int device = -1);
int64_t exchange_stream(int device, int64_t stream);
int64_t current_pool();
void push_pool(int64_t pool);
void pop_pool();
// Whether this thread may do what a capture of another thread in global mode forbids; gives what was before.
bool exchange_relaxed(bool value);
// Throws where a call (a sync, a query) is not allowed because of a capture, and spoils that capture, as CUDA does.
void refuse_in_capture(const char* what, const QueuePtr& queue = nullptr);

// What operators use: queue `run` on the current stream of `device`; ranges are what it touches.
struct Work {
  std::string name;
  std::vector<Range> ranges;
  std::function<void()> run;
  bool workspace = false;
  bool host_async = false;
};
void enqueue(int device, Work work);
// The host waits for the current stream of `device` (or all of the device).
void synchronize_stream(int device, int64_t stream);
// `by_name`: asked for as such, and not a part of something else, as of freeing memory.
void synchronize_device(int device, bool by_name = true);
// What the beginning and the end of a capture touch: a wait for the device is not permitted between them.
Touches capture_touches(const QueuePtr& queue);
void synchronize(const Deps& deps, const char* what);

}  // namespace anabranch::sim
