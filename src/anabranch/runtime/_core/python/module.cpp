// The runtime as Python sees it: private to the package. What is called often is plain CPython, the rest pybind11.
#include "../device.h"
#include "../flags.h"
#include "bindings.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace anabranch::runtime;
  m.def("cuda_api", [] { return reinterpret_cast<uintptr_t>(&cuda_api()); });
  m.def("flags", &flags_now);
  bind_observer(m);
  bind_errors(m);
  bind_limits(m);
  bind_program(m);
  bind_specialization(m);
  bind_allocations(m);
  bind_engine(m);
}
