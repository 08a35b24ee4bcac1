// One line of a trace, parsed but not yet judged.
#pragma once

#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace anabranch::race {

// What is wrong with a line, and what was expected there. The caller adds the line number.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Key : uint8_t {
  kDo,
  kThread,
  kStream,
  kReads,
  kWrites,
  kEvent,
  kBuffer,
  kOn,
  kGraph,
  kReuses,
  kLock,
  kOf,
  kDevice,
  kKind,
  kMode,
  kSource,
  kCount,
};

enum class Type : uint8_t { kAbsent, kNull, kString, kInteger, kStrings, kOther };

struct Field {
  Type type = Type::kAbsent;
  std::string_view text;  // kString
  int64_t number = 0;     // kInteger
  uint32_t first = 0;     // kStrings: items [first, first + count) of Event::items
  uint32_t count = 0;
  const char* what = "nothing";  // for messages: what was found
};

struct Event {
  Field fields[static_cast<size_t>(Key::kCount)];
  std::vector<std::string_view> items;

  const Field& operator[](Key key) const { return fields[static_cast<size_t>(key)]; }
};

// A strict JSON reader for one object a line. Known keys become fields; unknown ones are checked and skipped.
class Parser {
 public:
  // Fills `event` from `line`; its views point into `line` or into this parser and last until the next call.
  // Throws Malformed with the column and what was expected.
  void parse(std::string_view line, Event& event);

 private:
  [[noreturn]] void fail(const char* expected) const;
  void space();
  void expect(char c, const char* expected);
  std::string_view string();
  std::string_view escaped(const char* begin);
  void number(Field& field);
  void literal(std::string_view word);
  void strings(Field& field, Event& event);
  void value(Field& field, Event& event, bool known);
  void skip(int depth);
  void utf8();

  const char* begin_ = nullptr;
  const char* p_ = nullptr;
  const char* end_ = nullptr;
  std::deque<std::string> decoded_;
};

const char* name_of(Key key);

}  // namespace anabranch::race
