// Host threads: who is controlled, what each creates, its current device and streams; and the lock that respects the
// GIL.
#include "threads.h"

#include <c10/util/Exception.h>
#include <frameobject.h>  // PyFrame_GetBack, which Python.h does not bring along in 3.10

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

namespace anabranch::sim {

namespace {
thread_local Ids* t_ids = nullptr;
thread_local bool t_controlled = false;
thread_local std::string t_name;
thread_local int t_device = 0;
thread_local int64_t t_streams[kDevices] = {};
thread_local std::vector<int64_t> t_pools;
thread_local bool t_relaxed = false;

Ids free_ids;  // of all threads that are not controlled, and of the first that is
std::map<uint64_t, std::unique_ptr<Ids>> controlled_ids;
std::atomic<uint64_t> free_threads{0};
PyObject* point_hook = nullptr;
PyObject* amend_hook = nullptr;

bool python_is_up() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsInitialized() && !Py_IsFinalizing();
#else
  return Py_IsInitialized() && !_Py_IsFinalizing();
#endif
}

// A hook is the conductor; if it fails there is nobody left who could decide what runs next. An interrupt may come at
// its first instruction, where it cannot catch it.
void give_up() {
  if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
    std::fputs("anabranch: interrupted\n", stderr);
    std::fflush(nullptr);
    std::_Exit(130);
  }
  PyErr_Print();
  std::fflush(nullptr);
  std::_Exit(70);
}

PyObject* as_python(const Touches& touches) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(touches.size()));
  for (size_t i = 0; i < touches.size(); ++i) {
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), touch_tuple(touches[i]));
  }
  return list;
}
}  // namespace

Lock::Lock() {
  auto& mutex = Machine::get().mutex;
  if (mutex.try_lock()) return;
  if (python_is_up() && PyGILState_Check()) {
    PyThreadState* state = PyEval_SaveThread();
    mutex.lock();
    // Taking the GIL while holding the mutex is safe: whoever holds the GIL lets go of it before it waits here.
    PyEval_RestoreThread(state);
  } else {
    mutex.lock();
  }
}

Lock::~Lock() {
  Machine::get().mutex.unlock();
}

const void* this_thread() {
  return &t_device;
}
Ids& ids() {
  return t_ids ? *t_ids : free_ids;
}
bool controlled() {
  return t_controlled && point_hook;
}

std::string make_id(uint64_t Ids::* counter) {
  auto& mine = ids();
  return std::to_string(mine.index) + "." + std::to_string(++(mine.*counter));
}

void enroll(const std::string& name, uint64_t index) {
  Lock lock;
  t_controlled = true;
  t_name = name;
  if (index == 0) {
    t_ids = &free_ids;
  } else {
    auto& mine = controlled_ids[index];
    if (!mine) mine = std::make_unique<Ids>();
    mine->index = index;
    t_ids = mine.get();
  }
}

void withdraw() {
  t_controlled = false;
  t_name.clear();
  t_ids = nullptr;
}

void set_hooks(PyObject* point, PyObject* amend) {
  std::swap(point_hook, point);
  std::swap(amend_hook, amend);
  Py_XDECREF(point);
  Py_XDECREF(amend);
}

std::string thread_name() {
  if (t_name.empty()) t_name = "host" + std::to_string(free_threads++);
  return t_name;
}

PyObject* touch_tuple(const Touch& touch) {
  PyObject* tuple = PyTuple_New(4);
  PyTuple_SET_ITEM(tuple, 0, PyUnicode_FromStringAndSize(touch.key.data(), static_cast<Py_ssize_t>(touch.key.size())));
  PyTuple_SET_ITEM(tuple, 1, PyLong_FromLongLong(touch.lo));
  PyTuple_SET_ITEM(tuple, 2, PyLong_FromLongLong(touch.hi));
  PyTuple_SET_ITEM(tuple, 3, PyLong_FromLong(touch.mode));
  return tuple;
}

void point(const char* kind, const std::function<std::string()>& label, const std::function<Touches()>& touches,
           const std::vector<std::string>& needs) {
  if (!controlled() || !python_is_up()) return;
  auto text = label();
  Touches touched;
  {
    Lock lock;
    touched = touches();
  }
  PyGILState_STATE gil = PyGILState_Ensure();
  // An exception may be on its way while destructors come by here.
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* wanted = PyList_New(0);
  for (auto& need : needs) {
    PyObject* item = PyUnicode_FromString(need.c_str());
    PyList_Append(wanted, item);
    Py_DECREF(item);
  }
  PyObject* result = PyObject_CallFunction(point_hook, "ssNN", kind, text.c_str(), as_python(touched), wanted);
  if (!result) give_up();
  Py_DECREF(result);
  PyErr_Restore(type, value, traceback);
  PyGILState_Release(gil);
}

void amend(const Touches& touches) {
  if (!controlled() || !amend_hook || touches.empty() || !python_is_up()) return;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* result = PyObject_CallFunction(amend_hook, "N", as_python(touches));
  if (!result) give_up();
  Py_DECREF(result);
  PyGILState_Release(gil);
}

std::string source() {
  if (!Machine::get().tracing || !python_is_up()) return {};
  PyGILState_STATE gil = PyGILState_Ensure();
  std::string found;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const char* file = PyUnicode_AsUTF8(code->co_filename);
    bool ours = file && !std::strstr(file, "/torch/") && !std::strstr(file, "/anabranch/explore/") &&
                !std::strstr(file, "/anabranch/sim/") && file[0] != '<';
    if (ours) {
      const char* slash = std::strrchr(file, '/');
      found = std::string(slash ? slash + 1 : file) + ":" + std::to_string(PyFrame_GetLineNumber(frame));
    }
    Py_DECREF(code);
    PyFrameObject* back = ours ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  PyErr_Clear();
  PyGILState_Release(gil);
  for (auto& c : found) {
    if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32) c = '_';
  }
  return found;
}

int current_device() {
  return t_device;
}

int exchange_device(int device) {
  TORCH_CHECK(device >= 0 && device < kDevices, "sim: there is no device sim:", device, "; expected 0 to ",
              kDevices - 1);
  return std::exchange(t_device, device);
}

QueuePtr current_queue(int device) {
  if (device < 0) device = t_device;
  Lock lock;  // another thread may be making a stream
  return Machine::get().queue(device, t_streams[device]);
}

int64_t exchange_stream(int device, int64_t stream) {
  return std::exchange(t_streams[device], stream);
}
int64_t current_pool() {
  return t_pools.empty() ? 0 : t_pools.back();
}
void push_pool(int64_t pool) {
  t_pools.push_back(pool);
}
void pop_pool() {
  t_pools.pop_back();
}
bool exchange_relaxed(bool value) {
  return std::exchange(t_relaxed, value);
}

// Waiting for a device is not permitted while anything on it is being captured, in any mode and in any thread.
void refuse_with_captures_of(int device, const char* what) {
  auto& machine = Machine::get();
  Lock lock;
  for (auto& capture : machine.captures) {
    if (capture->origin->device != device) continue;
    capture->invalid = std::string(what) + " while a capture was under way";
    TORCH_CHECK(false, "sim: ", what, " is not permitted while one of its streams is under capture",
                "; do it before or after the capture");
  }
}

void refuse_in_capture(const char* what, const QueuePtr& queue) {
  auto& machine = Machine::get();
  Lock lock;
  for (auto& capture : machine.captures) {
    using Mode = Capture::CaptureMode;
    bool own = queue && queue->capture == capture;
    bool forbidden =
        capture->mode == Mode::kGlobal || (capture->mode == Mode::kThreadLocal && capture->thread == this_thread());
    if (own || (forbidden && !t_relaxed)) {
      capture->invalid = std::string(what) + " while a capture was under way";
      TORCH_CHECK(false, "sim: ", what, " is not permitted while a stream is under capture",
                  own ? "" : " in this thread, or anywhere in global mode", "; do it before or after the capture");
    }
  }
}

void enqueue(int device, Work work) {
  auto& machine = Machine::get();
  auto queue = current_queue(device);
  Op op;
  op.name = std::move(work.name);
  op.ranges = std::move(work.ranges);
  op.run = std::move(work.run);
  op.host_async = work.host_async;
  {
    Lock lock;
    op.id = make_id(&Ids::op);
  }
  point("queue", [&] { return op.name + " on " + queue->actor; }, [&] { return queue_touches(queue, op.id); });
  auto name = op.name;
  {
    Lock lock;
    machine.launch(queue, std::move(op), work.workspace);
  }
  // The host's next accesses of pinned memory go unseen: the copy may run before them, so that is a step's end.
  if (work.host_async) point("host", [&] { return "after " + name; }, [] { return Touches{}; });
}

namespace {

std::string captures_of(int device) {
  return "captures of sim:" + std::to_string(device);
}

}  // namespace

Touches capture_touches(const QueuePtr& queue) {
  return {{"q" + queue->actor, 0, 1, kWrite}, {captures_of(queue->device), 0, 1, kAdd}};
}

Touches queue_touches(const QueuePtr& queue, const std::string& op) {
  Touches all{{"q" + queue->actor, 0, 1, kWrite}, {"u" + op, 0, 1, kGive}};
  if (queue->kind == Queue::kLegacy) {
    for (auto& other : Machine::get().queues()) {
      if (other->kind == Queue::kBlocking && other->device == queue->device) {
        all.push_back({"q" + other->actor, 0, 1, kRead});
      }
    }
  } else if (queue->kind == Queue::kBlocking) {
    all.push_back({"q" + Machine::get().queue(queue->device, 0)->actor, 0, 1, kRead});
  }
  return all;
}

void synchronize(const Deps& deps, const char* what) {
  auto& machine = Machine::get();
  ++machine.asked;
  if (controlled()) {
    std::vector<std::string> needs;
    Touches touches;
    for (auto& dep : deps) {
      needs.push_back(dep.op);
      touches.push_back({"x" + dep.op, 0, 1, kNeed});
    }
    point("synced", [&] { return std::string(what); }, [&] { return touches; }, needs);
  } else {
    auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (;;) {
      {
        Lock lock;
        if (Machine::done(deps)) break;
        if (machine.advance(deps)) continue;
      }
      // Nothing can run: another thread has to open a latch.
      TORCH_CHECK(std::chrono::steady_clock::now() < patience, "sim: ", what,
                  " waited 60 s for work that is held by a latch which nobody opens; open it in another thread");
      bool held = python_is_up() && PyGILState_Check();
      PyThreadState* state = held ? PyEval_SaveThread() : nullptr;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (held) PyEval_RestoreThread(state);
    }
  }
  Lock lock;
  machine.fail_if_lost();
}

void synchronize_stream(int device, int64_t stream) {
  auto& machine = Machine::get();
  QueuePtr queue;
  {
    Lock lock;
    queue = machine.queue(device, stream);
  }
  refuse_in_capture("synchronizing a stream", queue);
  auto name = "synchronize " + queue->actor;
  point("sync", [&] { return name; }, [&] { return Touches{{"q" + queue->actor, 0, 1, kRead}}; });
  Deps deps;
  {
    Lock lock;
    deps = machine.frontier(queue);
  }
  synchronize(deps, name.c_str());
  Lock lock;
  if (machine.tracing) {
    machine.emit(R"({"do":"sync","on":")" + queue->trace_name() + R"(","thread":")" + thread_name() + "\"}");
  }
}

void synchronize_device(int device, bool by_name) {
  auto& machine = Machine::get();
  refuse_in_capture("synchronizing the device");
  auto name = "synchronize sim:" + std::to_string(device);
  point(
      "sync", [&] { return name; },
      [&] {
        Touches all;
        for (auto& queue : machine.queues()) all.push_back({"q" + queue->actor, 0, 1, kRead});
        all.push_back({captures_of(device), 0, 1, kRead});
        return all;
      });
  if (by_name) refuse_with_captures_of(device, "synchronizing the device");
  Deps deps;
  {
    Lock lock;
    deps = machine.frontier(device);
  }
  synchronize(deps, name.c_str());
  Lock lock;
  if (machine.tracing) {
    machine.emit(R"({"do":"sync","device":)" + std::to_string(device) + R"(,"thread":")" + thread_name() + "\"}");
  }
}

}  // namespace anabranch::sim
