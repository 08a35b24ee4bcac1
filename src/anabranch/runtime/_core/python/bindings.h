// What each file here adds to the module.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace anabranch::runtime {

void bind_allocations(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_errors(pybind11::module_& m);
void bind_limits(pybind11::module_& m);
void bind_observer(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_specialization(pybind11::module_& m);

}  // namespace anabranch::runtime
