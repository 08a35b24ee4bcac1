// What the runtime asks of a device beyond PyTorch's own device interface (c10's guards, streams, events, allocators):
// captured graphs and raw copies. Plain function pointers, filled in at run time: nothing is linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace anabranch::runtime {

struct StreamRef {
  void* handle;  // the device's own: a cudaStream_t
  int64_t id;    // PyTorch's
  int device;
};

// A kernel launch, as a graph's node or by itself.
struct KernelLaunch {
  void* function;    // a CUfunction; or null, and
  void* kernel;      // a CUkernel,
  void* cu_context;  // of this CUcontext
  const unsigned* grid;
  const unsigned* block;
  unsigned shared_bytes;
  void** params;  // a pointer to each parameter; or null, and
  void** extra;   // where all of them lie together
};

// Each returns 0, or the device's error code; or throws.
struct DeviceApi {
  // Queue a captured graph on the stream.
  int (*launch)(void* graph, const StreamRef& stream);
  // Queue a copy within the device's memory.
  int (*copy)(void* to, const void* from, size_t bytes, const StreamRef& stream);
  // Whether the caller is capturing the stream.
  int (*is_capturing)(const StreamRef& stream, bool* answer);
  // Later launches of `graph` run `node` with these parameters; launches already queued keep theirs. Null: cannot.
  int (*patch)(void* graph, void* node, const KernelLaunch& kernel);
  // Queue one kernel. Null: cannot.
  int (*launch_kernel)(const KernelLaunch& kernel, const StreamRef& stream);
  // Whether an error that lasts is known of. Null: one shows at the next call.
  bool (*is_lost)();
  // A stream of the current device that nobody else has, and that is never destroyed. Null: PyTorch's pool has to do.
  int (*new_stream)(StreamRef* made) = nullptr;
  // Have the stream wait for an event (PyTorch's `eventId`) that was recorded before; record it. For less than PyTorch
  // takes, which looks at the current device four times. Null: PyTorch does it.
  int (*wait)(void* event, const StreamRef& stream) = nullptr;
  int (*record)(void* event, const StreamRef& stream) = nullptr;
  // Whether the stream is never destroyed, so that its number never names another one. Null: nobody knows.
  bool (*is_lasting)(const StreamRef& stream) = nullptr;
  // Set which calls captures of other threads forbid to this one; `mode` comes back as it was. Null: none are
  // forbidden.
  int (*exchange_capture_mode)(int* mode) = nullptr;
};

// For as long as it lives, no capture of another thread forbids what this one does: to allocate, to load code.
class Relaxed {
 public:
  explicit Relaxed(const DeviceApi& api) : api_(api) { exchange(); }
  ~Relaxed() { exchange(); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  static constexpr int kRelaxed = 2;  // cudaStreamCaptureModeRelaxed
  void exchange() {
    if (api_.exchange_capture_mode && api_.exchange_capture_mode(&mode_)) mode_ = kRelaxed;
  }
  const DeviceApi& api_;
  int mode_ = kRelaxed;
};

// A device call failed.
class DeviceError : public std::runtime_error {
 public:
  DeviceError(const char* call, int code)
      : std::runtime_error(std::string(call) + " failed with code " + std::to_string(code)), call(call), code(code) {}
  const char* call;
  int code;
};

// Of CUDA, from the libraries that this process has loaded. Throws std::runtime_error where they lack an entry point.
const DeviceApi& cuda_api();

}  // namespace anabranch::runtime
