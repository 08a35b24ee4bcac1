// What only the bindings need of threads.cpp: it speaks Python.
#pragma once

#include <Python.h>

#include "machine.h"

namespace anabranch::sim {

// The calling thread is controlled from now on; `index` names what it creates (see Ids).
void enroll(const std::string& name, uint64_t index);
void withdraw();
// Takes over the references; null: nobody controls them.
void set_hooks(PyObject* point, PyObject* amend);
PyObject* touch_tuple(const Touch& touch);
// What queueing an item called `op` touches.
Touches queue_touches(const QueuePtr& queue, const std::string& op);

}  // namespace anabranch::sim
