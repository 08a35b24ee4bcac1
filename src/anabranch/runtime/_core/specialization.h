// One call of one signature: what the host does between the caller's stream and the results. DESIGN.md says who owns
// what, and which locks there are. Nothing here knows Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "context.h"
#include "counters.h"
#include "flags.h"
#include "input.h"
#include "program.h"
#include "results.h"

namespace anabranch::runtime {

// What orders the calls of one session: each waits for the one before it, on whatever stream that was.
struct SessionOrder {
  c10::Event* done = nullptr;  // recorded behind each call; null where the device has no streams
  c10::StreamId stream = -1;   // of the last record, if that is known
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

  Specialization(c10::Device device, const DeviceApi* api, std::vector<InputSpec> given, Limits* limits,
                 Counters* counters);

  // Run one call on the calling thread's current stream of the device. `inputs` have this signature, `numbers` are what
  // `program` takes after them. `kDeclined`: nothing was queued; this call takes a way that is not known here (it is
  // inside a caller's capture, say). `session`: whose state is among the inputs, if it is a session's call; nobody else
  // uses it meanwhile.
  //
  // Threads: any, without the GIL. Blocks for other threads' hosts only. Throws what the device throws; the context is
  // then out of use.
  Outcome run(const at::Tensor* inputs, const Values& numbers, const Builder& build, Values& results,
              SessionOrder* session = nullptr);

  // Of a call's own tensors, without those of a session.
  bool accepts(const at::Tensor* const* inputs, size_t count) const;
  // Whether a call runs in Python in the end, so that it need not let go of the GIL.
  bool needs_gil() const { return !uses_graphs && !program && kernels.empty(); }
  bool is_lost() const { return api_ && api_->is_lost && api_->is_lost(); }

  const c10::Device device;
  Pool pool;
  // Each holds the event of the last direct call on a stream: what the weights are waited for by, when they are freed.
  Pool events{nullptr};
  std::vector<InputSpec> specs;
  c10::SmallVector<size_t, 2> written;  // positions of what the program writes into
  size_t owned = 0;                     // how many tensors are a session's, after the call's
  bool may_write = false;               // the caller sees to it that what is written can be written where it is

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
  // Calls since somebody asked, about: for who chooses what to give up. Calls at once may count as one.
  std::atomic<uint32_t> uses{0};

 private:
  struct CallerStream {
    c10::Stream stream;
    StreamRef ref;
  };
  bool can_write(const at::Tensor* inputs) const;
  void note_writes(const at::Tensor* inputs) const;
  Outcome run_on(const CallerStream& caller, const at::Tensor* inputs, const Values& numbers, const Builder& build,
                 Values& results);
  Pool::Acquired acquire(const CallerStream& caller, const Builder& build);
  Outcome run_graph(const Pool::Acquired& acquired, const at::Tensor* inputs, const CallerStream& caller,
                    Values& results);
  // `caller`: null where the device has no streams.
  Outcome run_direct(const at::Tensor* inputs, const Values& numbers, const CallerStream* caller, Values& results);
  Outcome done(Counters::Name way);
  at::Tensor canonical(const at::Tensor& x, size_t i) const;
  void launch(Context& context, bool same_stream, const at::Tensor* inputs, const CallerStream& caller,
              const Regions& regions);
  void wait(const c10::Event& event, const CallerStream& caller) const;
  void record(c10::Event& event, const CallerStream& caller) const;
  bool is_unchanged() const;
  bool direct(const at::Tensor* inputs, const Values& numbers, const StreamRef& ref, Values& results);
  bool direct_using_weights(const at::Tensor* inputs, const Values& numbers, const CallerStream& caller,
                            Values& results);

  const DeviceApi* const api_;
  const c10::impl::VirtualGuardImpl guard_;
  Counters* const counters_;
};

}  // namespace anabranch::runtime
