// PyTorch's process-wide numerics flags, read without Python.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace anabranch::runtime {

// What operators read when they are queued: at least what `runtime/_flags.py` looks at.
using Flags = std::array<int64_t, 20>;

// None where PyTorch refuses to name a precision of products for all backends.
std::optional<Flags> flags_now();

}  // namespace anabranch::runtime
