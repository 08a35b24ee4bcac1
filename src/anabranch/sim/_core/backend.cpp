// What makes the machine a PyTorch device: guard, allocators, hooks.
#include <ATen/core/Generator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <set>

#include "threads.h"

namespace anabranch::sim {

const at::Generator& default_generator(int device);  // random.cpp
at::Generator new_generator(int device);

namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSim, static_cast<c10::DeviceIndex>(device)), id);
  }
  static QueuePtr queue(const c10::Stream& s) {
    Lock lock;
    return Machine::get().queue(s.device_index(), s.id());
  }

  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device d) const override {
    return c10::Device(kSim, static_cast<c10::DeviceIndex>(exchange_device(d.index())));
  }
  c10::Device getDevice() const override { return c10::Device(kSim, static_cast<c10::DeviceIndex>(current_device())); }
  void setDevice(c10::Device d) const override { exchange_device(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { exchange_device(d.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(c10::Device d) const override {
    Lock lock;
    return stream(d.index() < 0 ? current_device() : d.index(), current_queue(d.index())->id);
  }
  c10::Stream getDefaultStream(c10::Device d) const override {
    return stream(d.index() < 0 ? current_device() : d.index(), 0);
  }
  c10::Stream getNewStream(c10::Device d, int) const override {
    Lock lock;
    int device = d.index() < 0 ? current_device() : d.index();
    // Non-blocking, as the streams that PyTorch makes on CUDA are.
    return stream(device, Machine::get().new_stream(device, false)->id);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    queue(s);  // it exists
    return stream(s.device_index(), exchange_stream(s.device_index(), s.id()));
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id() + 1); }
  bool queryStream(const c10::Stream& s) const override {
    auto q = queue(s);
    refuse_in_capture("querying a stream", q);
    auto ask = [&] {
      Touches all{{"q" + q->actor, 0, 1, kRead}};
      for (auto& dep : Machine::get().frontier(q)) all.push_back({"y" + dep.op, 0, 1, kRead});
      return all;
    };
    ++Machine::get().asked;
    point("query", [&] { return "query " + q->actor; }, ask);
    Touches touched;
    bool done;
    {
      Lock lock;
      touched = ask();
      done = Machine::done(Machine::get().frontier(q));
      if (done && Machine::get().tracing) {
        Machine::get().emit(R"({"do":"sync","on":")" + q->trace_name() + R"(","thread":")" + thread_name() + "\"}");
      }
    }
    amend(touched);
    return done;
  }
  void synchronizeStream(const c10::Stream& s) const override { synchronize_stream(s.device_index(), s.id()); }
  void synchronizeDevice(const c10::DeviceIndex d) const override { synchronize_device(d < 0 ? current_device() : d); }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    auto q = queue(s);
    if (!*event) {
      Lock lock;
      auto* made = new Event;
      ++Machine::get().events;
      made->id = "e" + make_id(&Ids::event);
      *event = made;
    }
    auto& e = *static_cast<Event*>(*event);
    point(
        "queue", [&] { return "record " + e.id + " on " + q->actor; },
        [&] { return Touches{{e.id, 0, 1, kWrite}, {"q" + q->actor, 0, 1, kRead}}; });
    Lock lock;
    Machine::get().record(e, q);
  }
  void block(void* event, const c10::Stream& s) const override {
    if (!event) return;
    auto q = queue(s);
    auto& e = *static_cast<Event*>(event);
    point(
        "queue", [&] { return q->actor + " waits for " + e.id; },
        [&] { return Touches{{e.id, 0, 1, kRead}, {"q" + q->actor, 0, 1, kWrite}}; });
    Lock lock;
    Machine::get().wait(e, q);
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    auto& e = *static_cast<Event*>(event);
    refuse_in_capture("querying an event");
    auto ask = [&] {
      Touches all{{e.id, 0, 1, kRead}};
      for (auto& dep : e.deps) all.push_back({"y" + dep.op, 0, 1, kRead});
      return all;
    };
    ++Machine::get().asked;
    point("query", [&] { return "query " + e.id; }, ask);
    Touches touched;
    bool done;
    {
      Lock lock;
      TORCH_CHECK(!e.capture,
                  "sim: querying an event that was recorded inside a capture; record it again outside first");
      touched = ask();
      done = Machine::done(e.deps);
      if (done) saw(e);
    }
    amend(touched);
    return done;
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    auto& e = *static_cast<Event*>(event);
    refuse_in_capture("synchronizing an event");
    point("sync", [&] { return "synchronize " + e.id; }, [&] { return Touches{{e.id, 0, 1, kRead}}; });
    Deps deps;
    {
      Lock lock;
      TORCH_CHECK(!e.capture,
                  "sim: synchronizing an event that was recorded inside a capture; record it again outside first");
      deps = e.deps;
    }
    synchronize(deps, ("synchronize " + e.id).c_str());
    Lock lock;
    saw(e);
  }
  static void saw(const Event& e) {
    auto& machine = Machine::get();
    if (machine.tracing && e.recorded) {
      machine.emit(R"({"do":"sync","on":")" + e.id + R"(","thread":")" + thread_name() + "\"}");
    }
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (event) --Machine::get().events;
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "sim: time is not modelled, so events measure none; measure on a GPU");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    auto q = queue(s);
    Lock lock;
    Machine::get().record_stream(data.get(), q);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Allocator final : c10::DeviceAllocator {
  static void free(void* data) {
    if (!data) return;
    auto& machine = Machine::get();
    // It decides what the next allocation gets.
    point(
        "free", [] { return std::string("free"); },
        [&] {
          Touches all;
          auto* block = machine.block_of(reinterpret_cast<uintptr_t>(data));
          if (!block) return all;
          all.push_back({Machine::pool_key(block->device, block->pool, block->stream), 0, 1, kWrite});
          for (auto& other : block->others) all.push_back({"q" + other->actor, 0, 1, kRead});
          return all;
        });
    Lock lock;
    machine.release(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device device(kSim, static_cast<c10::DeviceIndex>(current_device()));
    if (!bytes) return {nullptr, nullptr, &free, device};
    auto& machine = Machine::get();
    auto queue = current_queue();
    auto pool = current_pool();
    point(
        "alloc", [&] { return "allocate " + std::to_string(bytes) + " bytes on " + queue->actor; },
        [&] { return machine.allocation_touches(bytes, queue, pool); });
    void* data;
    {
      Lock lock;
      amend(machine.allocation_touches(bytes, queue, pool));
      auto before = queue->pushed;
      data = machine.allocate(bytes, queue, pool)->data;
      if (controlled() && queue->pushed != before)
        amend({{"q" + queue->actor, 0, 1, kWrite}, {"u" + queue->last, 0, 1, kGive}});
    }
    return {data, data, &free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    enqueue(current_device(), {"copy",
                               {{reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(from) + bytes, false},
                                {reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(to) + bytes, true}},
                               [=] { std::memcpy(to, from, bytes); },
                               false,
                               false});
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Lock lock;
    Machine::get().trim(0);
  }
  void recordStream(const c10::DataPtr& data, c10::Stream s) override { Guard().recordDataPtrOnStream(data, s); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
};
Allocator allocator;

// Page-locked host memory. Queued copies keep the tensor, as PyTorch's own host allocator waits for their events.
struct PinnedAllocator final : c10::Allocator {
  std::mutex mutex;
  std::map<uintptr_t, size_t> all;
  static PinnedAllocator& get() {
    static auto* one = new PinnedAllocator;
    return *one;
  }
  static void free(void* data) {
    if (!data) return;
    auto& self = get();
    std::lock_guard<std::mutex> guard(self.mutex);
    self.all.erase(reinterpret_cast<uintptr_t>(data));
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    size_t rounded = (bytes / 64 + 1) * 64;
    void* data = std::aligned_alloc(64, rounded);
    std::lock_guard<std::mutex> guard(mutex);
    all[reinterpret_cast<uintptr_t>(data)] = rounded;
    return {data, data, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool holds(const void* data) {
    std::lock_guard<std::mutex> guard(mutex);
    auto address = reinterpret_cast<uintptr_t>(data);
    auto after = all.upper_bound(address);
    return after != all.begin() && address < std::prev(after)->first + std::prev(after)->second;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device()); }
  void setCurrentDevice(c10::DeviceIndex d) const override { exchange_device(d); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return static_cast<c10::DeviceIndex>(exchange_device(d));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override {
    return d < 0 ? getCurrentDevice() : exchangeDevice(d);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex d) const override {
    return default_generator(d < 0 ? current_device() : d);
  }
  at::Generator getNewGenerator(c10::DeviceIndex d) const override { return new_generator(d); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::get(); }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::get().holds(data); }
  at::Device getDeviceFromPtr(void* data) const override {
    Lock lock;
    auto* block = Machine::get().block_of(reinterpret_cast<uintptr_t>(data));
    TORCH_CHECK(block, "sim: not an address of device memory");
    return c10::Device(kSim, static_cast<c10::DeviceIndex>(block->device));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    int before = exchange_device(storage.device().index());
    auto fresh = allocator.allocate(bytes);
    size_t kept = std::min(bytes, storage.nbytes());
    if (kept) allocator.copy_data(fresh.get(), storage.data(), kept);
    exchange_device(before);
    auto& s = const_cast<c10::Storage&>(storage);
    s.set_data_ptr_noswap(std::move(fresh));
    s.set_nbytes(bytes);
  }
};

[[maybe_unused]] const bool registered = [] {
  c10::SetAllocator(kSim, &allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace
}  // namespace anabranch::sim
