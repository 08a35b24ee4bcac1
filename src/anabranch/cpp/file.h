// Program files, as anabranch.cpp.save_program writes them.
#pragma once

#include <string>
#include <vector>

#include "anabranch/engine.h"

namespace anabranch {

struct ProgramFile {
  Program program;
  std::vector<at::Tensor> weights;
  std::vector<Input> inputs;
  std::vector<State> state;
};

// With the weights and the state on the CPU; constants that name the model's device name `device`. Throws InputError.
ProgramFile read_program(const std::string& path, c10::Device device);

// "float32"
std::string dtype_name(c10::ScalarType dtype);

}  // namespace anabranch
