// The machine behind the native runtime's seam: what `anabranch::runtime::cuda_api` is for CUDA.
#include "native.h"

#include <cstring>

#include "../../runtime/_core/device.h"

namespace anabranch::sim {

void launch_graph(int64_t graph, const QueuePtr& queue) {
  auto& machine = Machine::get();
  std::shared_ptr<Graph> found;
  {
    Lock lock;
    found = machine.graphs.at(graph);
  }
  auto label = "launch " + found->id + " on " + queue->actor;
  point(
      "queue", [&] { return label; },
      [&] {
        auto all = queue_touches(queue, "");
        all.push_back({found->id, 0, 1, kWrite});
        return all;
      });
  std::string launched;
  {
    Lock lock;
    machine.launch_graph(found, queue);
    for (auto& dep : found->last_launch) launched = dep.op.substr(0, dep.op.rfind('n'));
  }
  amend({{"u" + launched, 0, 1, kGive}});
}

namespace {

using runtime::StreamRef;

QueuePtr queue_of(const StreamRef& stream) {
  Lock lock;
  return Machine::get().queue(stream.device, stream.id);
}

int launch(void* graph, const StreamRef& stream) {
  launch_graph(reinterpret_cast<int64_t>(graph), queue_of(stream));
  return 0;
}

int copy(void* to, const void* from, size_t bytes, const StreamRef& stream) {
  auto read = reinterpret_cast<uintptr_t>(from), write = reinterpret_cast<uintptr_t>(to);
  Work work;
  work.name = "copy";
  work.ranges = {{read, read + bytes, false}, {write, write + bytes, true}};
  work.run = [=] { std::memcpy(to, from, bytes); };
  enqueue(stream.device, std::move(work));
  return 0;
}

int is_capturing(const StreamRef& stream, bool* answer) {
  auto queue = queue_of(stream);
  Lock lock;
  *answer = queue->capture != nullptr;
  return 0;
}

bool is_lost() {
  Lock lock;
  return !Machine::get().error.empty();
}

// The machine never destroys a stream.
bool is_lasting(const StreamRef&) {
  return true;
}

const runtime::DeviceApi api{launch,  copy,    is_capturing, nullptr, nullptr,
                             is_lost, nullptr, nullptr,      nullptr, is_lasting};

}  // namespace

uintptr_t native_api() {
  return reinterpret_cast<uintptr_t>(&api);
}

}  // namespace anabranch::sim
