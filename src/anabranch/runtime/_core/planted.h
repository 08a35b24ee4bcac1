// Defects that the tests plant, to see that they are found. `planted(name)` is true in a build with `ANABRANCH_PLANTED`
// while the environment variable of that name says `name`: one build has all defects, and each run turns one on. In
// every other build it is a constant false, and the compiler leaves nothing of it.
#pragma once

#ifdef ANABRANCH_PLANTED
#include <cstdlib>
#include <cstring>
#endif

namespace anabranch::runtime {

#ifdef ANABRANCH_PLANTED
inline bool planted(const char* name) {
  // Looked up each time: a process that explores several defects, one after the other, changes it in between.
  const char* on = std::getenv("ANABRANCH_PLANTED");
  return on && !std::strcmp(on, name);
}
#else
constexpr bool planted(const char*) {
  return false;
}
#endif

}  // namespace anabranch::runtime
