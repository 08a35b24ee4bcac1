// One call of one signature: what the host does between the caller's stream and the results. DESIGN.md says who owns
// what, and which locks there are. Nothing here knows Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "flags.h"
#include "pool.h"
#include "program.h"
#include "results.h"

namespace anabranch::runtime {

// What an engine has done so far. Threads: any.
class Counters {
 public:
  enum Name { kCalls, kGraphCalls, kDirectCalls, kCaptured, kWaits, kCaptures, kSpecializations, kNames };
  static constexpr std::array<const char*, kNames> names{"calls", "graph_calls", "direct_calls",   "calls_in_captures",
                                                         "waits", "captures",    "specializations"};

  void add(Name name, int64_t count = 1) { mine().counts[name].count(names[name], count); }
  int64_t read(Name name) const;

 private:
  // Threads count in different places, so that they do not wait for each other's cache lines.
  struct alignas(64) Shard {
    Shard() : counts{make(0), make(1), make(2), make(3), make(4), make(5), make(6)} {}
    static Atomic<int64_t> make(int i) { return Atomic<int64_t>(names[static_cast<size_t>(i)], 0); }
    std::array<Atomic<int64_t>, kNames> counts;
  };
  static constexpr size_t kShards = 16;
  Shard& mine();
  std::array<Shard, kShards> shards_;
};

// Whether it is an ordinary dense tensor: its bytes are its values, it is no other tensor's stand-in (of vmap, say),
// and nothing is attached to it that a call would lose.
bool is_plain(const at::Tensor& x);

// Shape, strides and dtype of an input as the kernels see it.
struct InputSpec {
  c10::SmallVector<int64_t, 5> sizes, strides;
  at::ScalarType dtype;
  bool contiguous;
  size_t bytes;

  // Whether a call with `x` is one of this signature; says no where it takes a closer look to tell.
  bool accepts(const at::Tensor& x) const;
  // Whether the kernels can read `x` as it is: same strides where they matter, and aligned.
  bool matches(const at::Tensor& x, size_t alignment) const;
};

// Kernels with the places in their parameters where the addresses of a call's inputs and results belong.
struct Kernel {
  void* node = nullptr;                                             // in the graph, if it is part of one
  void *function = nullptr, *kernel = nullptr, *context = nullptr;  // see KernelLaunch
  std::array<unsigned, 3> grid, block;
  unsigned shared_bytes = 0;
  std::vector<char> params;
  std::vector<size_t> offsets;  // of each parameter in `params`
  bool packed = false;          // the driver takes them together
  struct Patch {
    size_t at;      // in `params`
    int buffer;     // inputs first, then regions of the results
    int64_t delta;  // bytes
  };
  std::vector<Patch> patches;
  bool is_set = false;  // the graph has what `params` says
};

// An execution context: the memory and the graph of one call in flight. `owner` keeps them, and when it is let go of
// sees to it that they are freed after `done`.
struct Context : Payload {
  std::shared_ptr<void> owner;
  c10::Event* done = nullptr;  // the owner's
  void* graph = nullptr;
  std::vector<at::Tensor> inputs;    // where the graph reads; undefined where it reads the caller's
  std::vector<const char*> results;  // where it writes each region; null where it writes the caller's
  std::vector<Kernel> kernels;       // those of its nodes that take addresses of the caller's
};

class Specialization {
 public:
  enum class Outcome { kDone, kDeclined };
  // Called where a context may be built, for `reserved` bytes: an owned slot; null to go on without a new one, by
  // `retry` with the contexts there are, else direct.
  struct Built {
    Slot* slot = nullptr;
    bool retry = false;
  };
  using Builder = std::function<Built(int64_t reserved)>;

  Specialization(c10::Device device, const DeviceApi* api, std::vector<InputSpec> specs, Limits* limits,
                 Counters* counters);

  // Run one call on the calling thread's current stream of the device. `inputs` have this signature, `numbers` are what
  // `program` takes after them. `kDeclined`:
  // nothing was queued; this call takes a way that is not known here (it is inside a caller's capture, say).
  //
  // Threads: any, without the GIL. Blocks for other threads' hosts only. Throws what the device throws; the context is
  // then out of use.
  Outcome run(const at::Tensor* inputs, const Values& numbers, const Builder& build, Values& results);

  bool accepts(const at::Tensor* const* inputs, size_t count) const;
  // Whether a call runs in Python in the end, so that it need not let go of the GIL.
  bool needs_gil() const { return !uses_graphs && !program && kernels.empty(); }
  bool is_lost() const { return api_ && api_->is_lost && api_->is_lost(); }

  const c10::Device device;
  Pool pool;
  // Each holds the event of the last direct call on a stream: what the weights are waited for by, when they are freed.
  Pool events{nullptr};
  std::vector<InputSpec> specs;

  // Set while the specialization is built, before any call.
  bool uses_graphs = false;
  bool has_weights = false;
  size_t alignment = 16;                   // bytes: of an input that kernels read where the caller has it
  std::optional<ResultLayout> layout;      // of results of a graph or of `kernels`
  std::vector<Kernel> kernels;             // launched one by one: the direct path of a program without temporaries
  std::shared_ptr<const Program> program;  // the direct path of operators
  // The direct path otherwise: kernels that only Python can launch. Asks for the GIL.
  std::function<void(const std::vector<at::Tensor>& inputs, Values& results)> python;
  std::function<std::unique_ptr<Payload>(c10::StreamId)> new_event;
  // Whether operators still read the numerics flags that the engine was compiled under; null: they read none. Asked
  // where they are not `flags`, in which case they are, for sure.
  std::function<bool()> flags_unchanged;
  std::optional<Flags> flags;
  Atomic<bool> may_grow{"may grow", true};

 private:
  at::Tensor canonical(const at::Tensor& x, size_t i) const;
  void launch(Context& context, bool same_stream, const at::Tensor* inputs, const c10::Stream& stream,
              const StreamRef& ref, const Regions& regions);
  void wait(const c10::Event& event, const c10::Stream& stream, const StreamRef& ref) const;
  void record(c10::Event& event, const c10::Stream& stream, const StreamRef& ref) const;
  bool is_unchanged() const;
  Outcome finish_direct(bool is_done, Values& results);
  bool direct(const at::Tensor* inputs, const Values& numbers, const StreamRef& ref, Values& results);

  const DeviceApi* const api_;
  const c10::impl::VirtualGuardImpl guard_;
  Counters* const counters_;
};

}  // namespace anabranch::runtime
