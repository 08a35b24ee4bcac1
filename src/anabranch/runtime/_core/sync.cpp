#include "sync.h"

namespace anabranch::runtime {

namespace {
Observer* g_observer = nullptr;
}

void install(Observer* observer) {
  g_observer = observer;
}

Observer* installed() {
  return g_observer;
}

}  // namespace anabranch::runtime
