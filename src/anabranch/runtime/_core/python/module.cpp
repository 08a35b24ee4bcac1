// The runtime as Python sees it: private to the package. What is called often is plain CPython, the rest pybind11.
#include <torch/csrc/utils/pybind.h>

#include "../device.h"
#include "../flags.h"

namespace anabranch::runtime {

// Each in the file of its name.
void bind_allocations(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_errors(pybind11::module_& m);
void bind_limits(pybind11::module_& m);
void bind_observer(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_session(pybind11::module_& m);
void bind_specialization(pybind11::module_& m);

}  // namespace anabranch::runtime

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
  bind_session(m);
}
