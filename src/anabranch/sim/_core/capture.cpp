// Captures and graphs: what is queued on a capturing stream becomes a node; a launch queues the nodes again.
#include "machine.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace anabranch::sim {

void Machine::begin_capture(const QueuePtr& queue, Capture::CaptureMode mode) {
  fail_if_lost();
  fault("capture");
  TORCH_CHECK(queue->kind != Queue::kLegacy,
              "sim: the legacy default stream cannot be captured; capture on a torch.Stream");
  TORCH_CHECK(!queue->capture, "sim: stream ", queue->actor, " is under capture already; end that capture first");
  auto capture = std::make_shared<Capture>();
  capture->mode = mode;
  capture->id = next_capture_++;
  capture->thread = this_thread();
  capture->origin = queue;
  capture->counts = {0};
  capture->waits.resize(1);
  capture->joined = {queue};
  queue->capture = capture;
  queue->lane = 0;
  captures.push_back(capture);
}

void Machine::abort_capture(const QueuePtr& queue) {
  auto capture = queue->capture;
  if (!capture) return;
  for (auto& joined : capture->joined) joined->capture = nullptr;
  captures.erase(std::remove(captures.begin(), captures.end(), capture), captures.end());
  for (auto& [address, block] : blocks_) {
    if (block->capture == capture) block->capture = nullptr;
  }
}

std::shared_ptr<Graph> Machine::end_capture(const QueuePtr& queue) {
  auto capture = queue->capture;
  TORCH_CHECK(capture, "sim: stream ", queue->actor, " is not under capture; begin one first");
  TORCH_CHECK(capture->origin == queue, "sim: the capture began on ", capture->origin->actor, ", not on ", queue->actor,
              "; end it there");
  abort_capture(queue);  // whatever comes next, it has ended
  fault("end of capture");
  TORCH_CHECK(capture->invalid.empty(), "sim: the capture was invalidated: ", capture->invalid,
              "; begin it again without that");

  // Everything must have been joined to the stream on which the capture began.
  std::vector<size_t> reached(capture->counts.size(), 0);
  std::vector<Place> open = capture->waits[0];
  open.push_back({0, capture->counts[0]});
  std::vector<std::vector<const Node*>> by_lane(capture->counts.size());
  for (auto& node : capture->nodes) by_lane[node.lane].push_back(&node);
  while (!open.empty()) {
    auto place = open.back();
    open.pop_back();
    for (size_t i = reached[place.lane]; i < place.count; ++i) {
      for (auto& dep : by_lane[place.lane][i]->deps) open.push_back(dep);
    }
    reached[place.lane] = std::max(reached[place.lane], place.count);
  }
  for (size_t lane = 0; lane < reached.size(); ++lane) {
    TORCH_CHECK(reached[lane] == capture->counts[lane], "sim: the capture has unjoined work on ",
                capture->joined[lane]->actor, ": make ", queue->actor, " wait for it before the capture ends");
  }

  auto graph = std::make_shared<Graph>();
  graph->id = "g" + make_id(&Ids::graph);
  graph->nodes = std::move(capture->nodes);
  graph->lanes = capture->counts.size();
  graph->on_destroy = std::move(capture->on_destroy);
  if (tracing) {
    trace_graph(*graph);
    capture_traces.push_back(std::move(capture->trace));
  }
  return graph;
}

void Machine::trace_graph(const Graph& graph) {
  std::vector<Range> all;
  for (auto& node : graph.nodes) {
    if (!node.op.poison) all.insert(all.end(), node.op.ranges.begin(), node.op.ranges.end());
  }
  auto key = [](const Range& r) { return std::tie(r.lo, r.hi, r.write); };
  std::sort(all.begin(), all.end(), [&](const Range& a, const Range& b) { return key(a) < key(b); });
  all.erase(std::unique(all.begin(), all.end(), [&](const Range& a, const Range& b) { return key(a) == key(b); }),
            all.end());
  log(nullptr, R"({"do":"graph","graph":")" + graph.id + R"(","reads":)" + describe(all, false) + R"(,"writes":)" +
                   describe(all, true));
}

void Machine::launch_graph(const std::shared_ptr<Graph>& graph, const QueuePtr& queue) {
  fail_if_lost();
  fault("launch");
  fault("graph");
  TORCH_CHECK(!queue->capture,
              "sim: launching a graph inside a capture (a child graph) is not modelled; launch it after the capture");
  log(queue, R"({"do":"replay","graph":")" + graph->id + R"(","stream":")" + queue->trace_name() + '"');
  auto launch = make_id(&Ids::op);
  std::vector<QueuePtr> lanes{queue};
  auto start = frontier(queue);
  add(start, graph->last_launch);
  // The first lane is the stream itself, where its own earlier work needs no dependency.
  for (auto& dep : graph->last_launch) {
    if (dep.queue != queue) add(queue->waits, dep);
  }
  for (size_t i = 1; i < graph->lanes; ++i) {
    auto lane = std::make_shared<Queue>();
    lane->kind = Queue::kLane;
    lane->device = queue->device;
    lane->actor = "g" + launch + "l" + std::to_string(i);
    lane->waits = start;
    lanes.push_back(lane);
    lanes_.push_back(lane);
  }
  std::vector<uint64_t> base;
  for (auto& lane : lanes) base.push_back(lane->pushed);
  std::vector<std::vector<std::string>> names(lanes.size());
  size_t serial = 0;
  for (auto& node : graph->nodes) {
    auto& lane = lanes[node.lane];
    for (auto& place : node.deps) {
      add(lane->waits, Dep{lanes[place.lane], base[place.lane] + place.count, names[place.lane][place.count - 1]});
    }
    Op op = node.op;
    op.id = launch + "n" + std::to_string(++serial);
    op.giver = launch;
    names[node.lane].push_back(op.id);
    push_real(lane, std::move(op));
  }
  graph->last_launch.clear();
  for (auto& lane : lanes) {
    if (lane->pushed) add(graph->last_launch, Dep{lane, lane->pushed, lane->last});
    if (lane != queue && lane->pushed) add(queue->waits, Dep{lane, lane->pushed, lane->last});
  }
}

}  // namespace anabranch::sim
