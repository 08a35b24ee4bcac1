// The C interface that Python loads with ctypes. No exception crosses it.
#include <cstring>
#include <new>
#include <string>

#include "detector.h"

namespace {

using anabranch::race::Detector;
using anabranch::race::Malformed;

constexpr size_t kLongestLine = size_t{64} << 20;

enum Status : int { kOk = 0, kMalformed = 1, kFailed = 2 };

struct Handle {
  explicit Handle(uint64_t report_limit) : detector(report_limit) {}

  Detector detector;
  std::string carry;  // a line whose end has not come yet
  std::string error;
  std::string answer;
  bool stopped = false;  // a malformed line in a stream of bytes ends it

  int line(std::string_view text) noexcept {
    try {
      detector.feed(text);
      return kOk;
    } catch (const Malformed& e) {
      error = "line " + std::to_string(detector.line()) + ": " + e.what();
      return kMalformed;
    } catch (const std::bad_alloc&) {
      error = "out of memory at line " + std::to_string(detector.line());
    } catch (const std::exception& e) {
      error = "internal error at line " + std::to_string(detector.line()) + ": " + e.what();
    }
    return kFailed;
  }

  int bytes(const char* data, size_t size) {
    const char* const end = data + size;
    while (data != end) {
      const char* newline = static_cast<const char*>(std::memchr(data, '\n', static_cast<size_t>(end - data)));
      const char* stop = newline == nullptr ? end : newline;
      std::string_view text(data, static_cast<size_t>(stop - data));
      if (carry.size() + text.size() > kLongestLine) {
        error =
            "line " + std::to_string(detector.line() + 1) + ": expected lines of at most 64 MiB, found a longer one";
        return kMalformed;
      }
      if (newline == nullptr) {
        carry.append(text);
        return kOk;
      }
      int status;
      if (carry.empty()) {
        status = line(text);
      } else {
        carry.append(text);
        status = line(carry);
        carry.clear();
      }
      if (status != kOk) return status;
      data = newline + 1;
    }
    return kOk;
  }
};

}  // namespace

extern "C" {

void* anabranch_race_new(uint64_t report_limit) {
  return new (std::nothrow) Handle(report_limit);
}

void anabranch_race_delete(void* handle) {
  delete static_cast<Handle*>(handle);
}

// One whole line. A malformed one is refused and leaves the detector usable.
int anabranch_race_line(void* handle, const char* data, size_t size) {
  return static_cast<Handle*>(handle)->line(std::string_view(data, size));
}

// Bytes of a trace file, in pieces of any size. Stops for good at the first malformed line.
int anabranch_race_bytes(void* handle, const char* data, size_t size) {
  Handle& h = *static_cast<Handle*>(handle);
  if (h.stopped) return kMalformed;
  try {
    const int status = h.bytes(data, size);
    h.stopped = status != kOk;
    return status;
  } catch (const std::exception& e) {
    h.error = e.what();
    h.stopped = true;
    return kFailed;
  }
}

// The end of the bytes: a last line may lack its newline.
int anabranch_race_end(void* handle) {
  Handle& h = *static_cast<Handle*>(handle);
  if (h.stopped) return kMalformed;
  if (h.carry.empty()) return kOk;
  const int status = h.line(h.carry);
  h.carry.clear();
  return status;
}

const char* anabranch_race_error(void* handle) {
  return static_cast<Handle*>(handle)->error.c_str();
}

// The number of the line (or event) that was last looked at.
uint64_t anabranch_race_position(void* handle) {
  return static_cast<Handle*>(handle)->detector.line();
}

// Counts: conflicts, stale uses, reports.
void anabranch_race_counts(void* handle, uint64_t* counts) {
  const Detector& d = static_cast<Handle*>(handle)->detector;
  counts[0] = d.races();
  counts[1] = d.stales();
  counts[2] = d.reported();
}

// Verdict, counts and every report, as JSON. Valid until the next call on this handle; null when memory is out.
const char* anabranch_race_summary(void* handle) {
  Handle& h = *static_cast<Handle*>(handle);
  try {
    h.answer = h.detector.summary();
    return h.answer.c_str();
  } catch (const std::exception&) {
    return nullptr;
  }
}

// One report, as JSON; `index` counts from 0 in the order of discovery.
const char* anabranch_race_report(void* handle, uint64_t index) {
  Handle& h = *static_cast<Handle*>(handle);
  return index < h.detector.reported() ? h.detector.report(static_cast<size_t>(index)).c_str() : nullptr;
}

}  // extern "C"
