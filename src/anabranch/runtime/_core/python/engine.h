#pragma once

#include <vector>

#include "specialization.h"
#include "values.h"

namespace anabranch::runtime {

// What a call finds out by itself: engines' base class. Its `tp_call` runs a call whose arguments are plain tensors of
// a signature that was compiled before; whatever is out of the ordinary goes to the method `_call`.
struct EngineBase {
  PyObject_HEAD struct Entry {
    PyObject* owner;  // Python's NativeCalls: kept through a call, so that the weights are
    PySpecialization* calls;
    char finish;  // '1': a tensor; 't': a tuple of all results; 'l': a list; 'p': by the method `_finish`
  };
  std::vector<Entry>* entries;   // of models that keep no state
  std::vector<Entry>* stateful;  // for sessions
  // Not closed, not of another process, the device not lost.
  bool is_usable;
};

EngineBase* engine_of(py::handle object);

// The tensors of a call, if they are plain ones and there is nothing else that Python has to look at.
using PlainTensors = c10::SmallVector<const at::Tensor*, 4>;
bool take_plain(PyObject* args, PyObject* kwargs, PlainTensors& given);

// What a call returns. Null with an error set.
PyObject* finish(const EngineBase::Entry& entry, PyObject* args, Values& results);

// `object._call(*args, **kwargs)`
PyObject* call_in_python(PyObject* object, PyObject* args, PyObject* kwargs);

// With an error set: the method `_failed` may put another one in its place.
void report(PyObject* self);

}  // namespace anabranch::runtime
