// CUDA's entry points, looked up in the libraries that PyTorch has loaded: the same build runs with any of its wheels.
#include <dlfcn.h>

#include "device.h"

namespace anabranch::runtime {

namespace {

// CUDA_KERNEL_NODE_PARAMS of driver API version 2.
struct NodeParams {
  void* function;
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  void** params;
  void** extra;
  void* kernel;
  void* context;
};

struct Entries {
  int (*graph_launch)(void* graph, void* stream);
  int (*stream_wait)(void* stream, void* event, unsigned flags);
  int (*event_record)(void* event, void* stream);
  int (*memcpy_async)(void* to, const void* from, size_t bytes, int kind, void* stream);
  int (*stream_is_capturing)(void* stream, int* status);
  int (*set_params)(void* graph, void* node, const NodeParams* params);
  int (*launch_kernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned shared_bytes, void* stream, void** params, void** extra);
  int (*create_stream)(void** stream, unsigned flags);
  int (*exchange_capture_mode)(int* mode);
};
Entries cuda;

constexpr int kDeviceToDevice = 3;    // cudaMemcpyDeviceToDevice
constexpr unsigned kNonBlocking = 1;  // cudaStreamNonBlocking

void* open_library(std::initializer_list<const char*> names) {
  for (auto* name : names) {
    if (void* found = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return found;
  }
  return RTLD_DEFAULT;
}

template <class F>
void find(void* library, const char* name, F*& entry) {
  void* found = dlsym(library, name);
  if (!found) found = dlsym(RTLD_DEFAULT, name);
  if (!found)
    throw std::runtime_error(std::string("the CUDA libraries of this process have no ") + name +
                             "; expected those that PyTorch needs. Update the NVIDIA driver");
  entry = reinterpret_cast<F*>(found);
}

}  // namespace

const DeviceApi& cuda_api() {
  static const DeviceApi api = [] {
    void* runtime = open_library({"libcudart.so.13", "libcudart.so.12"});
    void* driver = open_library({"libcuda.so.1", "libcuda.so"});
    find(runtime, "cudaMemcpyAsync", cuda.memcpy_async);
    // The runtime's, and the first that a call makes: it makes the device's context the thread's, which the driver's
    // own functions expect to find.
    find(runtime, "cudaStreamIsCapturing", cuda.stream_is_capturing);
    find(runtime, "cudaStreamCreateWithFlags", cuda.create_stream);
    find(runtime, "cudaThreadExchangeStreamCaptureMode", cuda.exchange_capture_mode);
    // The runtime's as well: PyTorch's profiler records no launches of the driver's, and cannot place kernels then.
    find(runtime, "cudaGraphLaunch", cuda.graph_launch);
    find(driver, "cuStreamWaitEvent", cuda.stream_wait);
    find(driver, "cuEventRecord", cuda.event_record);
    find(driver, "cuGraphExecKernelNodeSetParams_v2", cuda.set_params);
    find(driver, "cuLaunchKernel", cuda.launch_kernel);
    return DeviceApi{
        [](void* graph, const StreamRef& stream) { return cuda.graph_launch(graph, stream.handle); },
        [](void* to, const void* from, size_t bytes, const StreamRef& stream) {
          return cuda.memcpy_async(to, from, bytes, kDeviceToDevice, stream.handle);
        },
        [](const StreamRef& stream, bool* answer) {
          int status = 0;
          int code = cuda.stream_is_capturing(stream.handle, &status);
          *answer = status != 0;  // under capture, or a capture that was invalidated
          return code;
        },
        [](void* graph, void* node, const KernelLaunch& k) {
          NodeParams params{k.function,
                            {k.grid[0], k.grid[1], k.grid[2]},
                            {k.block[0], k.block[1], k.block[2]},
                            k.shared_bytes,
                            k.params,
                            k.extra,
                            k.kernel,
                            k.cu_context};
          return cuda.set_params(graph, node, &params);
        },
        [](const KernelLaunch& k, const StreamRef& stream) {
          // A CUkernel may be given in the place of a CUfunction.
          return cuda.launch_kernel(k.function ? k.function : k.kernel, k.grid[0], k.grid[1], k.grid[2], k.block[0],
                                    k.block[1], k.block[2], k.shared_bytes, stream.handle, k.params, k.extra);
        },
        nullptr,
        [](StreamRef* made) {
          int code = cuda.create_stream(&made->handle, kNonBlocking);
          // PyTorch's number of a stream that it did not make is its handle (c10/cuda/CUDAStream.cpp).
          made->id = static_cast<int64_t>(reinterpret_cast<intptr_t>(made->handle));
          return code;
        },
        [](void* event, const StreamRef& stream) { return cuda.stream_wait(stream.handle, event, 0); },
        [](void* event, const StreamRef& stream) { return cuda.event_record(event, stream.handle); },
        // 0 is the default stream's number, those of PyTorch's pools are odd, and both kinds outlive everything. The
        // others are handles of streams that somebody else made and may destroy.
        [](const StreamRef& stream) { return stream.id == 0 || (stream.id & 1); },
        [](int* mode) { return cuda.exchange_capture_mode(mode); },
    };
  }();
  return api;
}

}  // namespace anabranch::runtime
