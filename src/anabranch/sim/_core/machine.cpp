#include "machine.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace anabranch::sim {

Machine& Machine::get() {
  static auto* machine = new Machine;  // never destroyed: tensors outlive static destructors
  return *machine;
}

Machine::Machine() {
  for (int device = 0; device < kDevices; ++device) {
    auto queue = std::make_shared<Queue>();
    queue->kind = Queue::kLegacy;
    queue->device = device;
    queue->actor = device ? "s0d" + std::to_string(device) : "s0";
    streams_[{device, 0}] = queue;
  }
}

void add(Deps& deps, const Dep& dep) {
  if (!dep.count) return;
  for (auto& known : deps) {
    if (known.queue != dep.queue) continue;
    if (known.count < dep.count) known = dep;
    return;
  }
  deps.push_back(dep);
}

void add(Deps& deps, const Deps& more) {
  for (auto& dep : more) add(deps, dep);
}

namespace {
void add(std::vector<Place>& places, const Place& place) {
  if (!place.count) return;
  for (auto& known : places) {
    if (known.lane != place.lane) continue;
    known.count = std::max(known.count, place.count);
    return;
  }
  places.push_back(place);
}

Dep latest(const QueuePtr& queue) {
  return {queue, queue->pushed, queue->last};
}

std::string json_string(const std::string& text) {
  return '"' + text + '"';
}
}  // namespace

// -- streams -------------------------------------------------------------------------------------------------------

QueuePtr Machine::queue(int device, int64_t stream) {
  auto found = streams_.find({device, stream});
  TORCH_CHECK(found != streams_.end(), "sim: stream ", stream, " of sim:", device, " does not exist");
  return found->second;
}

QueuePtr Machine::new_stream(int device, bool blocking) {
  auto queue = std::make_shared<Queue>();
  queue->kind = blocking ? Queue::kBlocking : Queue::kNonblocking;
  queue->device = device;
  auto& counters = ids();
  queue->id = static_cast<int64_t>(counters.index * 4096 + ++counters.stream);
  queue->actor = "s" + std::to_string(queue->id) + (device ? "d" + std::to_string(device) : "");
  streams_[{device, queue->id}] = queue;
  if (tracing) {
    emit(R"({"do":"stream","stream":)" + json_string(queue->actor) + R"(,"kind":")" +
         (blocking ? "blocking" : "nonblocking") + R"(","device":)" + std::to_string(device) + "}");
  }
  return queue;
}

std::vector<QueuePtr> Machine::queues() {
  std::vector<QueuePtr> all;
  for (auto& [key, queue] : streams_) all.push_back(queue);
  lanes_.erase(std::remove_if(lanes_.begin(), lanes_.end(), [](const QueuePtr& lane) { return lane->ops.empty(); }),
               lanes_.end());
  all.insert(all.end(), lanes_.begin(), lanes_.end());
  return all;
}

// What is queued on a stream and, for the legacy stream and the blocking ones, on whatever it synchronizes with.
Deps Machine::frontier(const QueuePtr& queue) {
  Deps deps = queue->waits;
  add(deps, latest(queue));
  if (queue->kind == Queue::kLegacy) {
    for (auto& [key, other] : streams_) {
      if (other->device == queue->device && other->kind == Queue::kBlocking) {
        add(deps, other->waits), add(deps, latest(other));
      }
    }
  } else if (queue->kind == Queue::kBlocking) {
    auto legacy = this->queue(queue->device, 0);
    add(deps, legacy->waits), add(deps, latest(legacy));
  }
  return deps;
}

Deps Machine::frontier(int device) {
  Deps deps;
  for (auto& queue : queues()) {
    if (queue->device == device) add(deps, queue->waits), add(deps, latest(queue));
  }
  return deps;
}

// -- queueing ------------------------------------------------------------------------------------------------------

void Machine::push(const QueuePtr& queue, Op op) {
  if (!queue->capture) return push_real(queue, std::move(op));
  auto& capture = *queue->capture;
  Node node{queue->lane, std::move(op), std::move(capture.waits[queue->lane])};
  capture.waits[queue->lane].clear();
  capture.nodes.push_back(std::move(node));
  ++capture.counts[queue->lane];
}

void Machine::push_real(const QueuePtr& queue, Op op) {
  op.deps = frontier(queue);
  // Order within the stream needs no dependency.
  op.deps.erase(std::remove_if(op.deps.begin(), op.deps.end(), [&](const Dep& d) { return d.queue == queue; }),
                op.deps.end());
  queue->waits.clear();
  op.serial = ++serial_;
  if (op.giver.empty()) op.giver = op.id;
  pending_.insert(op.id);
  queue->last = op.id;
  ++queue->pushed;
  queue->ops.push_back(std::move(op));
}

void Machine::launch(const QueuePtr& queue, Op op, bool uses_workspace) {
  fail_if_lost();
  fault("launch");
  if (op.name == "copy" || op.name == "aten::copy_") fault("copy");
  if (uses_workspace) {
    // Two items, so that another stream's use of the same workspace can come between them.
    Block* block = workspace(queue);
    auto lo = reinterpret_cast<uintptr_t>(block->data);
    Range range{lo, lo + block->bytes, true};
    uint64_t token = std::hash<std::string>{}(op.id);
    auto* word = reinterpret_cast<uint64_t*>(block->data);
    Op first;
    first.id = op.id + "w";
    first.giver = op.id;
    first.name = op.name + " (workspace)";
    first.ranges = {range};
    first.run = [word, token] { *word = token; };
    std::vector<Range> results;
    for (auto& r : op.ranges) {
      if (r.write) results.push_back(r);
    }
    op.ranges.push_back(range);
    op.run = [word, token, results, run = std::move(op.run)] {
      bool intact = *word == token;
      run();
      if (intact) return;
      for (auto& r : results) std::fill(reinterpret_cast<uint16_t*>(r.lo), reinterpret_cast<uint16_t*>(r.hi), kPoison);
    };
    push(queue, std::move(first));
  }
  trace_op(op, queue);
  push(queue, std::move(op));
}

void Machine::record(Event& event, const QueuePtr& queue) {
  fail_if_lost();
  fault("record");
  event.recorded = true;
  event.deps.clear();
  event.inside.clear();
  event.capture = queue->capture;
  if (event.capture) {
    event.inside = event.capture->waits[queue->lane];
    add(event.inside, {queue->lane, event.capture->counts[queue->lane]});
  } else {
    event.deps = frontier(queue);
  }
  log(queue, R"({"do":"record","event":")" + event.id + R"(","stream":)" + json_string(queue->trace_name()));
}

void Machine::wait(const Event& event, const QueuePtr& queue) {
  fail_if_lost();
  fault("wait");
  if (!event.recorded) return;
  if (event.capture) {
    auto& capture = event.capture;
    TORCH_CHECK(std::find(captures.begin(), captures.end(), capture) != captures.end(),
                "sim: a stream waits for an event that was recorded inside a capture which has ended; record it again");
    if (!queue->capture) {
      // As on CUDA: a stream that waits for captured work enters the capture.
      TORCH_CHECK(queue->kind != Queue::kLegacy,
                  "sim: the legacy default stream cannot enter a capture; use a torch.Stream");
      queue->capture = capture;
      queue->lane = static_cast<int>(capture->joined.size());
      capture->joined.push_back(queue);
      capture->counts.push_back(0);
      capture->waits.emplace_back();
    }
    if (queue->capture != capture) {
      capture->invalid = queue->capture->invalid = "two captures were joined by an event";
      TORCH_CHECK(false, "sim: ", capture->invalid,
                  "; expected events of one capture. Record and wait in the same one");
    }
    for (auto& place : event.inside) {
      if (place.lane != queue->lane) add(capture->waits[queue->lane], place);
    }
  } else if (queue->capture) {
    queue->capture->invalid = "a captured stream waited for an event that was recorded outside the capture";
    TORCH_CHECK(false, "sim: ", queue->capture->invalid,
                " (on CUDA: error 905, stream capture isolation); record it inside the capture");
  } else {
    for (auto& dep : event.deps) {
      if (dep.queue != queue) add(queue->waits, dep);
    }
  }
  log(queue, R"({"do":"wait","event":")" + event.id + R"(","stream":)" + json_string(queue->trace_name()));
}

int64_t Machine::new_latch() {
  auto latch = std::make_shared<Queue>();
  latch->kind = Queue::kLatch;
  latch->last = "latch" + make_id(&Ids::op);
  pending_.insert(latch->last);
  latches[next_handle] = latch;
  return next_handle++;
}

void Machine::hold(int64_t latch, const QueuePtr& queue) {
  auto& found = latches.at(latch);
  add(queue->waits, Dep{found, 1, found->last});
}

void Machine::open_latch(int64_t latch) {
  auto& found = latches.at(latch);
  found->executed = 1;
  pending_.erase(found->last);
}

// -- stepping ------------------------------------------------------------------------------------------------------

bool Machine::done(const Deps& deps) {
  return std::all_of(deps.begin(), deps.end(), [](const Dep& d) { return d.queue->executed >= d.count; });
}

bool Machine::runnable(const Queue& queue) const {
  return !queue.ops.empty() && done(queue.ops.front().deps);
}

Touches Machine::touches(const Queue& queue) const {
  auto& op = queue.ops.front();
  Touches all{{"u" + op.giver, 0, 1, kNeed}, {"x" + op.id, 0, 1, kGive}, {"y" + op.id, 0, 1, kWrite}};
  for (auto& dep : op.deps) all.push_back({"x" + dep.op, 0, 1, kNeed});
  for (auto& range : op.ranges) {
    auto* block = const_cast<Machine*>(this)->block_of(range.lo);
    if (!block) continue;
    auto base = reinterpret_cast<uintptr_t>(block->data);
    all.push_back({"m" + block->id, static_cast<int64_t>(range.lo - base), static_cast<int64_t>(range.hi - base),
                   range.write ? kWrite : kRead});
  }
  if (op.host_async) all.push_back({"host", 0, 1, kHostAsync});
  return all;
}

void Machine::step(const QueuePtr& queue) {
  TORCH_CHECK(runnable(*queue), "sim: ", queue->actor, " has nothing that can run");
  Op op = std::move(queue->ops.front());
  queue->ops.pop_front();
  if (error.empty() || op.poison) {
    c10::InferenceMode ordinary(false);
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_python(
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
    try {
      op.run();
    } catch (const std::exception& e) {
      error = op.name + ": " + e.what();
      error = error.substr(0, error.find('\n'));
    }
  }
  pending_.erase(op.id);
  ++queue->executed;
}

bool Machine::need(const Deps& deps) {
  for (auto& dep : deps) {
    if (dep.queue->executed >= dep.count) continue;
    if (dep.queue->ops.empty()) continue;  // a closed latch
    if (runnable(*dep.queue)) return step(dep.queue), true;
    if (need(dep.queue->ops.front().deps)) return true;
  }
  return false;
}

bool Machine::advance(const Deps& towards) {
  if (policy == "lazy") return need(towards);
  std::vector<QueuePtr> ready;
  for (auto& queue : queues()) {
    if (runnable(*queue)) ready.push_back(queue);
  }
  if (ready.empty()) return false;
  if (policy == "random") {
    step(ready[random() % ready.size()]);
  } else {
    step(*std::min_element(ready.begin(), ready.end(), [](const QueuePtr& a, const QueuePtr& b) {
      return a->ops.front().serial < b->ops.front().serial;
    }));
  }
  return true;
}

void Machine::fail_if_lost() {
  TORCH_CHECK(error.empty(), "sim: device error in queued work: ", error, "; anabranch.sim.reset() clears it");
}

void Machine::fault(const std::string& kind) {
  auto found = faults.find(kind);
  if (found == faults.end() || --found->second.after > 0) return;
  if (--found->second.times <= 0) faults.erase(found);
  TORCH_CHECK_WITH(OutOfMemoryError, kind != "alloc", "sim out of memory: an allocation was made to fail");
  TORCH_CHECK(false, "sim: a ", kind, " was made to fail");
}

void Machine::reset() {
  for (auto& queue : queues()) {
    for (auto& op : queue->ops) pending_.erase(op.id);
    queue->executed += queue->ops.size();
    queue->ops.clear();
    queue->waits.clear();
    queue->capture = nullptr;
  }
  captures.clear();
  faults.clear();
  error.clear();
}

// -- the trace -----------------------------------------------------------------------------------------------------

std::string Machine::describe(const std::vector<Range>& ranges, bool write) {
  std::string text = "[";
  for (auto& range : ranges) {
    if (range.write != write || range.lo == range.hi) continue;
    auto* block = block_of(range.lo);
    if (!block) continue;
    auto base = reinterpret_cast<uintptr_t>(block->data);
    if (text.size() > 1) text += ',';
    text += '"' + block->name + '[' + std::to_string(range.lo - base) + ':' + std::to_string(range.hi - base) + "]\"";
  }
  return text + ']';
}

void Machine::log(const QueuePtr& queue, const std::string& line) {
  if (!tracing) return;
  std::string whole = line + R"(,"thread":)" + json_string(thread_name());
  auto where = source();
  if (!where.empty()) whole += R"(,"source":)" + json_string(where);
  whole += '}';
  if (queue && queue->capture) {
    queue->capture->trace += whole + '\n';
  } else {
    emit(whole);
  }
}

void Machine::trace_op(const Op& op, const QueuePtr& queue) {
  if (!tracing) return;
  log(queue, R"({"do":"op","name":)" + json_string(op.name) + R"(,"stream":)" + json_string(queue->trace_name()) +
                 R"(,"reads":)" + describe(op.ranges, false) + R"(,"writes":)" + describe(op.ranges, true));
}

}  // namespace anabranch::sim
