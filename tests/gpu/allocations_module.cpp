// The log of allocations as a module of its own.
#include "allocations.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  anabranch::runtime::bind_allocations(m);
}
