#pragma once

#include <memory>
#include <vector>

#include "../runtime/_core/input.h"
#include "../runtime/_core/program.h"
#include "anabranch/engine.h"

namespace anabranch {

// A program as the runtime runs it.
struct Lowered {
  std::shared_ptr<const runtime::Program> program;
  std::vector<int64_t> outputs;  // slots: weights, inputs, state, and then what `program` returns
};

// `given`: of inputs and then state. Throws InputError.
Lowered lower(const Program& program, const std::vector<at::Tensor>& weights,
              const std::vector<runtime::InputSpec>& given);

}  // namespace anabranch
