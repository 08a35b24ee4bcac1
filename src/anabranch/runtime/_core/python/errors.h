#pragma once

#include <exception>

namespace anabranch::runtime {

// Sets Python's error from what was thrown.
void set_error(const std::exception_ptr& error);

}  // namespace anabranch::runtime
