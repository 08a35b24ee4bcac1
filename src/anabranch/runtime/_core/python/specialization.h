#pragma once

#include "../specialization.h"

#include <memory>

#include "gil.h"

namespace anabranch::runtime {

// The C++ of a torch.Event, which stays Python's.
c10::Event* event_of(py::handle event);

// What Python has of a specialization.
struct PySpecialization {
  std::unique_ptr<Specialization> spec;
  std::shared_ptr<PyObject> limits, counters;  // kept
  std::shared_ptr<PyObject> owner;             // a weak reference to the Python object, which builds contexts
  std::shared_ptr<PyObject> unchanged;         // () -> bool: see Specialization::flags_unchanged

  Specialization::Built build(int64_t reserved);

  // An interrupt came between the context's being added by Python and its having an owner who knows of it.
  void discard_added();

  // `is_unchanged`: () -> bool, see Specialization::flags_unchanged, or None. `only_numerics`: it looks at nothing
  // else.
  void watch_flags(const py::object& is_unchanged, bool only_numerics);

  // Called with the GIL, which is let go of meanwhile, unless the kernels need it. False: this call has to take another
  // way. Throws.
  bool run(const at::Tensor* inputs, const Values& numbers, Values& results, SessionOrder* session = nullptr);
};

}  // namespace anabranch::runtime
