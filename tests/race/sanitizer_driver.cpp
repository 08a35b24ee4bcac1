// Judges traces from stdin, each preceded by its length in four bytes. Built with sanitizers by test_malformed.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
void* anabranch_race_new(uint64_t report_limit);
void anabranch_race_delete(void* handle);
int anabranch_race_bytes(void* handle, const char* data, size_t size);
int anabranch_race_end(void* handle);
const char* anabranch_race_summary(void* handle);
}

int main() {
  unsigned long traces = 0;
  unsigned long clean = 0;
  unsigned char length[4];
  while (std::fread(length, 1, 4, stdin) == 4) {
    const size_t size = length[0] | length[1] << 8 | length[2] << 16 | static_cast<size_t>(length[3]) << 24;
    std::vector<char> data(size);  // exactly as long as the trace, so that a read past it is seen
    if (std::fread(data.data(), 1, size, stdin) != size) return 1;
    void* handle = anabranch_race_new(20);
    const size_t half = size / 2;
    if (anabranch_race_bytes(handle, data.data(), half) == 0) {
      anabranch_race_bytes(handle, data.data() + half, size - half);
    }
    anabranch_race_end(handle);
    clean += std::strstr(anabranch_race_summary(handle), "clean") != nullptr;
    anabranch_race_delete(handle);
    ++traces;
  }
  std::printf("{\"traces\": %lu, \"clean\": %lu}\n", traces, clean);
  return 0;
}
