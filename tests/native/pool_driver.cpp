// The native runtime's pool and bookkeeping over a device in plain C++: no PyTorch, no Python, so that sanitizers see
// every instruction. Built and run by test_pool.py:   pool_driver SCENARIO [name=number ...]
//
// The device gives a sanitizer the orders that a real one gives, and no others:
//
//   host -> stream    what is queued comes after what its host did before
//   stream -> stream  by an event that one records and the other waits for, and by nothing else
//   stream -> host    by waiting for an event, and by nothing else
//
// So a stream's queue is one-way: whoever pushes learns nothing from who pops, nor from who pushed before. (A mutex per
// queue would order each host after all that the stream has run so far: most missing waits would be hidden.) Kernels
// read and write plain memory. Counters are relaxed, because those order nothing.
//
// Exit status: 0 all is well, 1 a check failed, 3 nothing moved for `watchdog` milliseconds; else a sanitizer's.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "pool.h"

using anabranch::runtime::install;
using anabranch::runtime::Limits;
using anabranch::runtime::Observer;
using anabranch::runtime::Payload;
using anabranch::runtime::Pool;
using anabranch::runtime::Slot;

#ifdef PLANTED
// Which of test_pool.py's defects this run has; it patches them into a copy of the sources.
int planted = 0;
#endif

namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

// -- checks ----------------------------------------------------------------------------------------------------------

// At once: a sanitizer would first report threads and memory that are still there.
[[noreturn]] void leave(int status) {
  syscall(SYS_exit_group, status);
  std::abort();
}

[[noreturn]] void fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "pool_driver: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  leave(status);
}

#define CHECK(condition, ...)               \
  do {                                      \
    if (!(condition)) fail(1, __VA_ARGS__); \
  } while (false)

// Ends the process when nothing moves any more: a lost waiter is found here, not by the test's time-out.
class Watchdog {
 public:
  explicit Watchdog(int64_t milliseconds) : thread_([this, milliseconds] { watch(milliseconds); }) {}
  ~Watchdog() {
    stop_.store(true, kRelaxed);
    thread_.join();
  }
  static void moved() { moves_.fetch_add(1, kRelaxed); }

 private:
  void watch(int64_t milliseconds) {
    constexpr int64_t kStep = 5;
    int64_t still = 0;
    for (uint64_t last = 0; !stop_.load(kRelaxed);) {
      std::this_thread::sleep_for(std::chrono::milliseconds(kStep));
      auto moves = moves_.load(kRelaxed);
      still = moves == last ? still + kStep : 0;
      last = moves;
      if (still >= milliseconds) fail(3, "hang: nothing moved for %lld ms", static_cast<long long>(milliseconds));
    }
  }
  static inline std::atomic<uint64_t> moves_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

uint64_t g_seed = 1;

class Random {
 public:
  explicit Random(uint64_t number) : state_((number + 1) * 0x9E3779B97F4A7C15u + g_seed * 0xD1342543DE82EF95u) {}
  uint64_t below(uint64_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return (state_ >> 11) % n;
  }
  // Once in `n` times; never for 0.
  bool once_in(uint64_t n) { return n && below(n) == 0; }

 private:
  uint64_t state_;
};

// -- the device ------------------------------------------------------------------------------------------------------

// Sanitizers do not look into system calls: sleeping and waking orders nothing.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value, int64_t microseconds) {
  timespec timeout{0, static_cast<long>(microseconds * 1000)};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &timeout, nullptr, 0);
}
void wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// One record of an event. Who waits comes after everything that its stream ran before it.
class Record {
 public:
  void set() {
    done_.store(1, std::memory_order_release);
    wake(done_);
  }
  void wait() {
    while (!done_.load(std::memory_order_acquire)) sleep_while(done_, 0, 100'000);
  }
  // Orders nothing.
  bool is_set() const { return done_.load(kRelaxed); }

 private:
  std::atomic<uint32_t> done_{0};
};

// A queue, and the thread that runs it in order.
class Stream {
 public:
  using Work = std::function<void()>;

  explicit Stream(int64_t id) : id(id), cells_(kCells), thread_([this] { run(); }) {}
  ~Stream() {
    push(nullptr);
    thread_.join();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void push(Work work) {
    auto ticket = pushed_.fetch_add(1, kRelaxed);
    while (ticket - popped_.load(kRelaxed) >= kCells) sched_yield();
    cells_[ticket % kCells].store(new Work(std::move(work)), std::memory_order_release);
    bell_.fetch_add(1, kRelaxed);
    wake(bell_);
  }
  void record(Record& event) {
    push([&event] { event.set(); });
  }
  void wait(Record& event) {
    push([&event] { event.wait(); });
  }

  const int64_t id;

 private:
  static constexpr uint64_t kCells = 4096;

  void run() {
    for (uint64_t i = 0;; ++i) {
      auto& cell = cells_[i % kCells];
      Work* work;
      for (;;) {
        auto bell = bell_.load(kRelaxed);
        work = cell.load(std::memory_order_acquire);
        if (work) break;
        sleep_while(bell_, bell, 1000);  // the time-out is for machines that show the bell before the cell
      }
      cell.store(nullptr, kRelaxed);
      popped_.store(i + 1, kRelaxed);
      auto last = !*work;
      if (!last) (*work)();
      delete work;
      if (last) return;
    }
  }

  std::vector<std::atomic<Work*>> cells_;
  std::atomic<uint64_t> pushed_{0}, popped_{0};
  std::atomic<uint32_t> bell_{0};
  std::thread thread_;
};

// -- an engine as the runtime makes it -------------------------------------------------------------------------------

constexpr int kWords = 8;
constexpr int64_t kPoison = -0x5555555555555555;

int64_t model(int64_t x, int i) {
  return x * 31 + i * 7 + 5;
}

struct Options {
  int64_t threads = 8;
  int64_t streams = 4;
  int64_t contexts = 2;       // the limit; 0: none; below 0: a pool without limits
  int64_t calls = 100;        // of each thread
  int64_t memory = -1;        // the limit
  int64_t change = 0;         // each call on another stream
  int64_t errors = 0;         // one call in so many fails
  int64_t trim = 0;           // drain the pool all the time
  int64_t visit = 0;          // look at all contexts all the time
  int64_t jitter = 0;         // an observer lets others run in the middle of the pool's code, once in so many times
  int64_t trust = 0;          // wait on the device only where the pool says so
  int64_t no_wait = 0;        // planted in the runtime's part: never wait on the device
  int64_t early_free = 0;     // planted in the runtime's part: do not wait before a context is destroyed
  int64_t early_release = 0;  // planted in the runtime's part: a context is given back before its use is recorded
  int64_t watchdog = 30'000;
  int64_t seed = 1;
  int64_t planted = 0;
};

std::atomic<int64_t> g_live{0}, g_built{0};

struct Context : Payload {
  Context(Limits* limits, int64_t bytes, uint64_t pool) : limits(limits), bytes(bytes), pool(pool) {
    auto live = g_live.fetch_add(1, kRelaxed) + 1;
    CHECK(!limits || live <= limits->max_contexts, "%lld contexts", static_cast<long long>(live));
    g_built.fetch_add(1, kRelaxed);
    std::fill_n(buffer, kWords, kPoison);
    std::fill_n(scratch, kWords, kPoison);
  }
  ~Context() override {
    g_live.fetch_sub(1, kRelaxed);
    if (limits) limits->forget(bytes);
  }

  Limits* const limits;
  const int64_t bytes;
  const uint64_t pool;
  // The owner's alone, on the host.
  int64_t uses = 0;
  int64_t only_on = Slot::kNever;
  Record* done = nullptr;
  // The device's.
  int64_t buffer[kWords];
  int64_t scratch[kWords];
};

struct Call {
  int64_t input[kWords];
  int64_t output[kWords];
  bool failed = false;
  Record done;
};

class Engine {
 public:
  Engine(const Options& options, uint64_t number)
      : options_(options),
        number_(number),
        limits_(options.contexts > 0 ? options.contexts : INT64_MAX, options.memory),
        pool_(options.contexts < 0 ? nullptr : &limits_) {}

  struct Host {
    Host(uint64_t number) : number(number), random(number) {}
    uint64_t number;
    Random random;
    std::deque<Call> calls;  // kept until the device is done with all
    size_t verified = 0;
    int64_t pooled = 0, direct = 0, failed = 0, waits = 0;
  };

  void call(Host& host, Stream& stream) {
    auto& call = host.calls.emplace_back();
    for (int i = 0; i < kWords; ++i) {
      call.input[i] = static_cast<int64_t>(number_ << 48 | host.number << 32 | host.calls.size() << 8) + i;
      call.output[i] = kPoison;
    }
    auto acquired = pool_.acquire(stream.id, true);
    auto* slot = acquired.slot;
    if (acquired.kind == Pool::Acquired::kRoom) slot = build(host, acquired.reserved);
    if (!slot) {
      CHECK(options_.contexts >= 0 || options_.errors, "a pool without limits gave nothing");
      direct(call, stream);
      ++host.direct;
      return;
    }
    auto& context = static_cast<Context&>(*slot->payload);
    CHECK(context.pool == number_, "a context of pool %llu in pool %llu", (unsigned long long)context.pool,
          (unsigned long long)number_);
    if (options_.contexts < 0) {
      if (context.only_on == Slot::kNever) context.only_on = stream.id;
      CHECK(context.only_on == stream.id && !acquired.waits, "lent across streams");
    }
    CHECK(!acquired.waits || context.done, "waits for a context that was never used");
    ++context.uses;
    host.waits += acquired.waits;
    if (context.done && (acquired.waits || !options_.trust) && !options_.no_wait) stream.wait(*context.done);
    stream.push([&call, &context] { std::copy_n(call.input, kWords, context.buffer); });
    stream.push([&context] {
      for (int i = 0; i < kWords; ++i) context.scratch[i] = model(context.buffer[i], i);
    });
    if (host.random.once_in(options_.errors)) {
      stream.record(call.done);
      context.done = &call.done;
      destroy(pool_.discard(slot));
      call.failed = true;
      ++host.failed;
      return;
    }
    if (options_.early_release) pool_.release(slot, stream.id);
    stream.push([&call, &context] {
      std::copy_n(context.scratch, kWords, call.output);
      std::fill_n(context.buffer, kWords, kPoison);
      std::fill_n(context.scratch, kWords, kPoison);
    });
    stream.record(call.done);
    context.done = &call.done;
    ++host.pooled;
    if (!options_.early_release) pool_.release(slot, stream.id);
  }

  // Looks at the outputs so far. A host that waited for an output is ordered after that call: so not at every call.
  void verify(Host& host) {
    for (; host.verified < host.calls.size(); ++host.verified) {
      auto& call = host.calls[host.verified];
      if (call.failed) continue;
      call.done.wait();
      for (int i = 0; i < kWords; ++i) {
        CHECK(call.output[i] == model(call.input[i], i), "wrong output: thread %llu, call %zu",
              (unsigned long long)host.number, host.verified);
      }
    }
  }

  void trim() {
    for (auto& payload : pool_.drain()) destroy(std::move(payload));
  }

  int64_t visit() {
    int64_t sum = 0;
    pool_.for_each([&](Payload& payload) { sum += static_cast<Context&>(payload).bytes; });
    return sum;
  }

  // As `warm` does: contexts that no stream has used.
  void warm(int64_t n) {
    Host host(0);
    while (pool_.alive() < n && limits_.reserve(pool_.estimate())) {
      if (auto* slot = build(host, pool_.estimate())) pool_.release(slot, Slot::kNever);
    }
  }

  Pool& pool() { return pool_; }
  Limits& limits() { return limits_; }

 private:
  Slot* build(Host& host, int64_t reserved) {
    if (host.random.once_in(options_.errors)) {
      if (options_.contexts >= 0) limits_.forget(reserved);
      return nullptr;
    }
    auto bytes = static_cast<int64_t>(80 + host.random.below(41));
    auto* limits = options_.contexts < 0 ? nullptr : &limits_;
    auto fits = !limits || limits->confirm(reserved, bytes);
    auto context = std::make_unique<Context>(limits, bytes, number_);
    if (!fits) return nullptr;
    if (limits) {
      auto [contexts, held] = limits->held();
      CHECK(contexts <= limits->max_contexts, "%lld contexts held", (long long)contexts);
      CHECK(held >= bytes, "%lld bytes held", (long long)held);
    }
    return pool_.add(std::move(context), bytes);
  }

  static void direct(Call& call, Stream& stream) {
    stream.push([&call] {
      for (int i = 0; i < kWords; ++i) call.output[i] = model(call.input[i], i);
    });
    stream.record(call.done);
  }

  void destroy(std::unique_ptr<Payload> payload) {
    auto& context = static_cast<Context&>(*payload);
    if (context.done && !options_.early_free) context.done->wait();
  }

  const Options& options_;
  const uint64_t number_;
  Limits limits_;
  Pool pool_;
};

// -- an observer that lets others run --------------------------------------------------------------------------------

// How many calls got a context so far.
std::atomic<int64_t> g_served{0};

// Does what the plain objects do; between any two of the pool's steps it may let other threads run. It also notes when
// a thread stands in line.
class Jitter : public Observer {
 public:
  explicit Jitter(int64_t once_in) : once_in_(once_in) { install(this); }
  ~Jitter() override { install(nullptr); }

  void* make(Kind kind, const char*) override {
    step();
    if (kind == kEvent) {  // to wait for, by a thread that stands in line from now on: it holds the pool's lock
      t_stood_at = g_served.load(kRelaxed);
      stood_.fetch_add(1, kRelaxed);
    }
    return new Handle;
  }
  void forget(void* handle) override { delete static_cast<Handle*>(handle); }
  void acquire(void* handle) override {
    step();
    static_cast<Handle*>(handle)->mutex.lock();
  }
  void release(void* handle) override {
    step();
    static_cast<Handle*>(handle)->mutex.unlock();
    step();
  }
  void set(void* handle) override {
    auto* event = static_cast<Handle*>(handle);
    std::lock_guard<std::mutex> guard(event->mutex);
    event->is_set = true;
    event->changed.notify_all();
  }
  void wait(void* handle) override {
    step();
    auto* event = static_cast<Handle*>(handle);
    std::unique_lock<std::mutex> lock(event->mutex);
    event->changed.wait(lock, [event] { return event->is_set; });
  }
  void touch(void*, const char* what, Mode) override {
    step();
    if (t_hook && std::strcmp(what, t_hook_at) == 0 && --t_hook_after < 0) std::exchange(t_hook, nullptr)();
  }

  // Do this once, in this thread, before an access of this name; `after` others come first.
  static void before(const char* what, int after, std::function<void()> hook) {
    t_hook_at = what;
    t_hook_after = after;
    t_hook = std::move(hook);
  }
  // How many times a thread stood in line so far.
  static int64_t stood() { return stood_.load(kRelaxed); }

  // How many calls were served since this thread stood in line, which it did in the `acquire` that it just left; -1 if
  // it did not.
  static int64_t overtaken() {
    auto served = g_served.fetch_add(1, kRelaxed);
    auto since = t_stood_at;
    t_stood_at = -1;
    return since < 0 ? -1 : served - since;
  }

 private:
  struct Handle {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_set = false;
  };

  void step() {
    static std::atomic<uint64_t> threads{0};
    thread_local Random random(threads.fetch_add(1, kRelaxed));
    // Not for long: where others are busy, each time may cost some milliseconds.
    if (!random.once_in(once_in_) || std::chrono::steady_clock::now() > end_) return;
    if (random.below(8))
      sched_yield();
    else
      usleep(50);
  }

  static inline thread_local int64_t t_stood_at = -1;
  static inline thread_local const char* t_hook_at = nullptr;
  static inline thread_local int t_hook_after = 0;
  static inline thread_local std::function<void()> t_hook;
  static inline std::atomic<int64_t> stood_{0};
  const uint64_t once_in_;
  const std::chrono::steady_clock::time_point end_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
};

// -- scenarios -------------------------------------------------------------------------------------------------------

using Streams = std::deque<Stream>;

void make_streams(Streams& streams, int64_t n) {
  for (int64_t i = 0; i < n; ++i) streams.emplace_back(100 + i);
}

void in_threads(int64_t n, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back([&body, i] { body(i); });
  for (auto& thread : threads) thread.join();
}

// Something that goes on in a thread of its own until the end of the block.
class Meanwhile {
 public:
  template <class Body>
  explicit Meanwhile(Body body)
      : thread_([this, body] {
          while (!stop_.load(kRelaxed)) body();
        }) {}
  ~Meanwhile() {
    stop_.store(true, kRelaxed);
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

void calls(const Options& options) {
  std::unique_ptr<Jitter> jitter;
  if (options.jitter) jitter = std::make_unique<Jitter>(options.jitter);
  std::deque<Engine::Host> hosts;  // longer than the streams: these use its memory
  for (int64_t i = 0; i < options.threads; ++i) hosts.emplace_back(i);
  Streams streams;
  make_streams(streams, options.streams);
  auto engine = std::make_unique<Engine>(options, 1);
  {
    std::unique_ptr<Meanwhile> trim, visit;
    if (options.trim) trim = std::make_unique<Meanwhile>([&] { engine->trim(), usleep(100); });
    if (options.visit) visit = std::make_unique<Meanwhile>([&] { engine->visit(), usleep(20); });
    in_threads(options.threads, [&](int64_t i) {
      auto& host = hosts[i];
      for (int64_t n = 0; n < options.calls; ++n) {
        engine->call(host, streams[options.change ? host.random.below(streams.size()) : i % streams.size()]);
        Watchdog::moved();
        if (host.random.once_in(8)) engine->verify(host);
      }
      engine->verify(host);
    });
  }
  int64_t pooled = 0, direct = 0, failed = 0, waits = 0;
  for (auto& host : hosts) {
    pooled += host.pooled;
    direct += host.direct;
    failed += host.failed;
    waits += host.waits;
  }
  CHECK(pooled + direct + failed == options.threads * options.calls, "calls are missing");
  CHECK(pooled > 0, "no call had a context");
  if (options.contexts > 1 && options.memory < 0 && !options.errors && !options.trim) {
    CHECK(direct < pooled, "%lld calls ran direct", (long long)direct);
  }
  CHECK(engine->pool().alive() == g_live.load(kRelaxed), "%lld alive", (long long)engine->pool().alive());
  if (options.contexts >= 0) CHECK(engine->limits().held().first == g_live.load(kRelaxed), "limits count wrong");
  engine->trim();
  CHECK(engine->pool().alive() == 0 && g_live.load(kRelaxed) == 0, "a context is left");
  CHECK(engine->limits().held() == (std::pair<int64_t, int64_t>(0, 0)), "limits hold something");
  std::printf("{\"calls\": %lld, \"pooled\": %lld, \"direct\": %lld, \"failed\": %lld, \"built\": %lld, ",
              (long long)(pooled + direct + failed), (long long)pooled, (long long)direct, (long long)failed,
              (long long)g_built.load(kRelaxed));
  std::printf("\"waits\": %lld}\n", (long long)waits);
}

// One context, and many who want it. What pool.h promises: while somebody stands in line no slot becomes idle, and the
// line is served from its head. So between a thread's standing in line and its service every other thread is served at
// most once: because it stands before it, or because it had the context already and is counted late. After that it
// stands behind it.
void fair(const Options& options) {
  Jitter jitter(options.jitter);
  std::deque<Engine::Host> hosts;
  for (int64_t i = 0; i < options.threads; ++i) hosts.emplace_back(i);
  Limits limits(1, -1);
  Pool pool(&limits);
  CHECK(limits.reserve(0), "no room");
  pool.release(pool.add(std::make_unique<Context>(&limits, 0, 0), 0), Slot::kNever);
  std::atomic<int64_t> most{-1}, stood{0};
  std::atomic<int64_t> inside{0};
  in_threads(options.threads, [&](int64_t i) {
    auto& host = hosts[i];
    for (int64_t n = 0; n < options.calls; ++n) {
      auto stream = options.change ? static_cast<int64_t>(host.random.below(4)) : i;
      auto acquired = pool.acquire(stream, true);
      CHECK(acquired.kind == Pool::Acquired::kContext, "no context");
      auto overtaken = Jitter::overtaken();
      CHECK(inside.fetch_add(1, kRelaxed) == 0, "two calls have one context");
      ++static_cast<Context&>(*acquired.slot->payload).uses;
      stood.fetch_add(overtaken >= 0, kRelaxed);
      for (auto seen = most.load(kRelaxed); overtaken > seen && !most.compare_exchange_weak(seen, overtaken, kRelaxed);)
        continue;
      inside.fetch_sub(1, kRelaxed);
      pool.release(acquired.slot, stream);
      Watchdog::moved();
    }
  });
  auto bound = options.threads - 1;
  CHECK(most.load() <= bound, "%lld other calls were served while one stood in line; at most %lld should",
        (long long)most.load(), (long long)bound);
  CHECK(stood.load() > 0, "nobody ever stood in line");
  for (auto& payload : pool.drain()) {
    CHECK(static_cast<Context&>(*payload).uses == options.threads * options.calls, "calls are missing");
  }
  CHECK(limits.held().first == 0, "limits hold something");
  std::printf("{\"calls\": %lld, \"stood_in_line\": %lld, \"most_served_meanwhile\": %lld, \"bound\": %lld}\n",
              (long long)(options.threads * options.calls), (long long)stood.load(), (long long)most.load(),
              (long long)bound);
}

// Pools come and go at one address, under threads that remember slots of the ones before; and threads come and go.
void hints(const Options& options) {
  std::deque<Engine::Host> hosts;
  for (int64_t i = 0; i < options.threads * 2; ++i) hosts.emplace_back(i);
  Streams streams;
  make_streams(streams, options.streams);
  alignas(Engine) static unsigned char place[sizeof(Engine)];
  Engine* engine = nullptr;
  // Has the memory of the last pool's slots while the next one is made: this one's lie elsewhere.
  std::unique_ptr<std::deque<Slot>> in_the_way;
  // Threads that live for all pools take turns with the one that makes and destroys these.
  std::mutex mutex;
  std::condition_variable changed;
  int64_t round = 0, busy = 0;
  std::vector<std::thread> threads;
  auto work = [&](Engine::Host& host) {
    for (int64_t n = 0; n < options.calls; ++n) {
      engine->call(host, streams[host.random.below(streams.size())]);
      Watchdog::moved();
    }
    engine->verify(host);
  };
  for (int64_t i = 0; i < options.threads; ++i) {
    threads.emplace_back([&, i] {
      for (int64_t mine = 1; mine <= 20; ++mine) {
        {
          std::unique_lock<std::mutex> lock(mutex);
          changed.wait(lock, [&] { return round == mine; });
        }
        work(hosts[i]);
        std::lock_guard<std::mutex> guard(mutex);
        if (--busy == 0) changed.notify_all();
      }
    });
  }
  for (int64_t n = 1; n <= 20; ++n) {
    engine = new (place) Engine(options, n);
    in_the_way.reset();
    engine->warm(options.contexts);
    {
      std::lock_guard<std::mutex> guard(mutex);
      round = n;
      busy = options.threads;
      changed.notify_all();
    }
    // These end while the pool lives: what they remember dies with them.
    in_threads(options.threads, [&](int64_t i) { work(hosts[options.threads + i]); });
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return busy == 0; });
    // As the runtime does for an engine that is dropped: what is in use goes when the device is done with it.
    if (n % 2) engine->trim();
    auto& limits = engine->limits();
    CHECK(limits.held().first == g_live.load(kRelaxed), "limits count wrong");
    engine->~Engine();
    in_the_way = std::make_unique<std::deque<Slot>>();
    CHECK(g_live.load(kRelaxed) == 0, "a context is left");
  }
  for (auto& thread : threads) thread.join();
  int64_t sum = 0;
  for (auto& host : hosts) sum += host.pooled + host.direct;
  CHECK(sum == options.threads * 2 * 20 * options.calls, "calls are missing");
  std::printf("{\"calls\": %lld, \"built\": %lld}\n", (long long)sum, (long long)g_built.load());
}

// Which context a call gets: one thread, no device.
void choice(const Options&) {
  Limits limits(3, -1);
  Pool pool(&limits);
  auto kind = [](const Pool::Acquired& acquired) { return acquired.kind; };
  using Acquired = Pool::Acquired;
  auto build = [&](int64_t stream) {
    auto acquired = pool.acquire(stream, true);
    CHECK(kind(acquired) == Acquired::kRoom && !acquired.slot && acquired.reserved == pool.estimate(), "no room");
    CHECK(limits.confirm(acquired.reserved, 100), "over the limit");
    return pool.add(std::make_unique<Context>(&limits, 100, 0), 100);
  };
  auto expect = [&](int64_t stream, Slot* slot, bool waits) {
    auto acquired = pool.acquire(stream, true);
    CHECK(kind(acquired) == Acquired::kContext && acquired.slot == slot && acquired.waits == waits,
          "stream %lld: another context", (long long)stream);
    return slot;
  };
  CHECK(kind(pool.acquire(1, false)) == Acquired::kNothing, "a context out of nothing");
  auto* a = build(1);
  pool.release(a, 1);
  std::thread([&] { pool.release(expect(1, a, false), 1); }).join();  // without a hint
  auto* b = build(2);                                                 // rather than wait for another stream's
  pool.release(expect(1, a, false), 1);
  pool.release(b, Slot::kNever);
  expect(2, b, false);  // one that was never used, rather than a new one
  pool.release(b, 2);
  pool.release(expect(1, a, false), 1);
  auto* c = build(3);
  pool.release(c, 3);
  expect(4, b, true);  // the least recently used
  expect(4, a, true);
  expect(4, c, true);
  pool.release(a, 1);
  pool.release(c, 1);
  pool.release(b, 1);
  expect(1, b, false);  // by its hint
  expect(1, a, false);
  auto gone = pool.discard(b);
  CHECK(gone && pool.alive() == 2 && limits.held().first == 3, "discarded, not destroyed");
  gone.reset();
  CHECK(limits.held() == (std::pair<int64_t, int64_t>(2, 200)), "limits hold what is gone");
  CHECK(expect(1, c, false) && build(1) == b, "the empty slot is used again");
  pool.release(a, 1);
  CHECK(pool.drain().size() == 1 && pool.alive() == 2, "only idle contexts are taken out");
  CHECK(pool.drain().empty(), "taken out twice");
  pool.release(b, 1);
  pool.release(c, 5);
  expect(5, c, false);
  CHECK(limits.has_room(1) && kind(pool.acquire(9, false)) == Acquired::kContext, "a context may not be built, and is");
  pool.release(b, 9);
  pool.release(c, 9);
  pool.forget_uses();
  auto acquired = pool.acquire(5, true);
  CHECK(kind(acquired) == Acquired::kContext && !acquired.waits, "a use that was to be forgotten");
  std::printf("{}\n");
}

// Orders that threads seldom come in, made by hand: nobody is left in line.
void line(const Options&) {
  Jitter observer(0);
  Limits limits(2, -1);
  Pool pool(&limits);
  using Acquired = Pool::Acquired;
  auto add = [&] { return pool.add(std::make_unique<Context>(&limits, 0, 0), 0); };
  // A thread that waits while `then` runs, and what it gets.
  auto meanwhile = [&](const std::function<void()>& then) {
    Acquired acquired;
    auto stood = Jitter::stood();
    std::thread waiter([&] { acquired = pool.acquire(1, true); });
    while (Jitter::stood() == stood) usleep(100);
    then();
    waiter.join();
    return acquired;
  };
  CHECK(limits.reserve(0) && limits.reserve(0), "no room");  // for one, and in the way of another

  // The last context is discarded.
  auto* slot = add();
  auto acquired = meanwhile([&] {
    pool.discard(slot).reset();
    CHECK(limits.reserve(0), "no room");
  });
  CHECK(acquired.kind == Acquired::kNothing, "discarded, and handed out");

  // It is given back by who got it without a look at the line.
  slot = add();
  acquired = meanwhile([&] {
    CHECK(pool.drain().empty(), "drained from an owner's hands");
    pool.release(slot, 2);
    CHECK(pool.drain().empty(), "drained from those who wait");
  });
  CHECK(acquired.slot == slot && acquired.waits, "another context");

  // There is one more, which is built and given back while they wait.
  acquired = meanwhile([&] {
    limits.forget(0);
    auto room = pool.acquire(3, true);
    CHECK(room.kind == Acquired::kRoom, "no room");
    pool.release(add(), 1);
  });
  CHECK(acquired.kind == Acquired::kContext && acquired.slot != slot && !acquired.waits, "another context");

  // Two wait, and one of two contexts comes back twice.
  auto* other = acquired.slot;
  Acquired second;
  acquired = meanwhile([&] {
    second = meanwhile([&] {
      pool.release(slot, 1);  // to the first
      pool.release(slot, 1);  // in its place
    });
  });
  CHECK(acquired.slot == slot && second.slot == slot, "another context");

  // It is given back when who wants it has looked for it, and does not stand in line yet.
  Jitter::before("look", 2, [&] { pool.release(slot, 2); });
  acquired = pool.acquire(1, true);
  CHECK(acquired.slot == slot && acquired.waits, "another context");
  CHECK(!pool.take(other), "taken from an owner's hands");
  pool.release(other, 1);
  CHECK(pool.take(other), "idle, and not taken");
  for (auto* mine : {slot, other}) pool.discard(mine).reset();
  CHECK(limits.held().first == 0, "limits hold something");
  std::printf("{}\n");
}

// A reservation that memory forbids leaves no trace: another, for which there is room, is not refused because of it.
void reserve(const Options& options) {
  Limits limits(1, 100);
  std::atomic<int64_t> refused{0};
  {
    Meanwhile large([&] { CHECK(!limits.reserve(101), "over the limit"); });
    for (int64_t i = 0; i < options.calls; ++i) {
      if (limits.reserve(100))
        limits.forget(100);
      else
        refused.fetch_add(1, kRelaxed);
      Watchdog::moved();
    }
  }
  CHECK(refused.load() == 0, "%lld of %lld reservations were refused, for which there was room",
        (long long)refused.load(), (long long)options.calls);
  CHECK(limits.held() == (std::pair<int64_t, int64_t>(0, 0)), "limits hold something");
  std::printf("{\"calls\": %lld}\n", (long long)options.calls);
}

// A fork while other threads are in the middle of calls: in the child the idle contexts are there, and nobody waits.
void forks(const Options& options) {
  Limits limits(options.contexts, -1);
  Pool pool(&limits);
  for (int64_t i = 0; i < options.contexts; ++i) {
    CHECK(limits.reserve(0), "no room");
    pool.release(pool.add(std::make_unique<Context>(&limits, 0, 0), 0), Slot::kNever);
  }
  std::atomic<bool> stop{false};
  std::thread parent([&] {
    in_threads(options.threads, [&](int64_t i) {
      while (!stop.load(kRelaxed)) {
        auto acquired = pool.acquire(i % options.streams, true);
        ++static_cast<Context&>(*acquired.slot->payload).uses;
        pool.release(acquired.slot, i % options.streams);
        Watchdog::moved();
      }
    });
  });
  int64_t idle = 0;
  for (int64_t n = 0; n < options.calls; ++n) {
    auto child = fork();
    CHECK(child >= 0, "fork failed");
    if (child == 0) {
      alarm(20);
      pool.after_fork();
      auto alive = pool.alive();
      std::vector<Pool::Acquired> all;
      if (limits.held().first != alive) fail(1, "child: the limits count contexts that are lost");
      for (int64_t i = 0; i < alive; ++i) all.push_back(pool.acquire(i, false));
      for (auto& acquired : all) {
        if (acquired.kind != Pool::Acquired::kContext || !acquired.slot->payload)
          fail(1, "child: an idle context is lost");
        ++static_cast<Context&>(*acquired.slot->payload).uses;
      }
      for (auto& acquired : all) pool.release(acquired.slot, 7);
      if (static_cast<int64_t>(pool.drain().size()) != alive || pool.alive()) fail(1, "child: not all were given back");
      if (pool.acquire(1, false).kind != Pool::Acquired::kNothing) fail(1, "child: a context out of nothing");
      leave(static_cast<int>(100 + alive));
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status), "a child hangs or crashed (status %d)", status);
    CHECK(WEXITSTATUS(status) >= 100, "a child failed (status %d)", WEXITSTATUS(status));
    idle += WEXITSTATUS(status) - 100;
  }
  stop.store(true, kRelaxed);
  parent.join();
  CHECK(pool.alive() == options.contexts, "the parent lost a context");
  std::printf("{\"forks\": %lld, \"idle\": %lld}\n", (long long)options.calls, (long long)idle);
}

}  // namespace

int main(int count, char** words) {
  Options options;
  const std::map<std::string, int64_t Options::*> names = {
      {"threads", &Options::threads},       {"streams", &Options::streams},
      {"contexts", &Options::contexts},     {"calls", &Options::calls},
      {"memory", &Options::memory},         {"change", &Options::change},
      {"errors", &Options::errors},         {"trim", &Options::trim},
      {"visit", &Options::visit},           {"jitter", &Options::jitter},
      {"trust", &Options::trust},           {"no_wait", &Options::no_wait},
      {"early_free", &Options::early_free}, {"early_release", &Options::early_release},
      {"watchdog", &Options::watchdog},     {"seed", &Options::seed},
      {"planted", &Options::planted},
  };
  const std::map<std::string, void (*)(const Options&)> scenarios = {
      {"calls", calls},     {"fair", fair}, {"hints", hints}, {"choice", choice},
      {"reserve", reserve}, {"line", line}, {"forks", forks},
  };
  if (count < 2 || !scenarios.count(words[1])) fail(2, "no such scenario");
  for (int i = 2; i < count; ++i) {
    const std::string word = words[i];
    const auto equals = word.find('=');
    if (equals == std::string::npos || !names.count(word.substr(0, equals))) fail(2, "what is %s?", words[i]);
    options.*names.at(word.substr(0, equals)) = std::strtoll(words[i] + equals + 1, nullptr, 10);
  }
  g_seed = options.seed;
#ifdef PLANTED
  planted = static_cast<int>(options.planted);
#else
  if (options.planted) fail(2, "nothing is planted here");
#endif
  Watchdog watchdog(options.watchdog);
  scenarios.at(words[1])(options);
  return 0;
}
