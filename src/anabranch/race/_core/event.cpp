#include "event.h"

#include <cstdio>
#include <cstring>

namespace anabranch::race {

namespace {

constexpr int kDeepest = 64;  // nesting of values under unknown keys: a bound, so that no input overflows the stack
constexpr size_t kKeys = static_cast<size_t>(Key::kCount);
constexpr const char* kKeyNames[kKeys] = {"do",    "thread", "stream", "reads", "writes", "event", "buffer", "on",
                                          "graph", "reuses", "lock",   "of",    "device", "kind",  "mode",   "source"};

Key key_of(std::string_view text) {
  for (size_t i = 0; i < kKeys; ++i) {
    if (text == kKeyNames[i]) return static_cast<Key>(i);
  }
  return Key::kCount;
}

bool plain(unsigned char c) {
  return c >= 0x20 && c < 0x80 && c != '"' && c != '\\';
}

bool digit(char c) {
  return c >= '0' && c <= '9';
}

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3f));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

}  // namespace

const char* name_of(Key key) {
  return kKeyNames[static_cast<size_t>(key)];
}

void Parser::parse(std::string_view line, Event& event) {
  begin_ = p_ = line.data();
  end_ = begin_ + line.size();
  decoded_.clear();
  event.items.clear();
  for (Field& field : event.fields) field = Field{};

  space();
  expect('{', "'{': one JSON object a line");
  space();
  if (p_ < end_ && *p_ == '}') {
    ++p_;
  } else {
    for (;;) {
      if (p_ >= end_ || *p_ != '"') fail("a field name in double quotes");
      const Key key = key_of(string());
      space();
      expect(':', "':' after the field name");
      space();
      if (key == Key::kCount) {
        skip(0);
      } else {
        Field& field = event.fields[static_cast<size_t>(key)];
        if (field.type != Type::kAbsent) {
          throw Malformed(std::string("expected each field once, found \"") + name_of(key) + "\" twice");
        }
        value(field, event, key == Key::kReads || key == Key::kWrites);
      }
      space();
      if (p_ < end_ && *p_ == ',') {
        ++p_;
        space();
        continue;
      }
      expect('}', "',' or '}' after the value");
      break;
    }
  }
  space();
  if (p_ != end_) fail("the end of the line after '}'");
}

void Parser::fail(const char* expected) const {
  char found[48];
  if (p_ >= end_) {
    std::snprintf(found, sizeof found, "the end of the line");
  } else if (static_cast<unsigned char>(*p_) > 0x20 && static_cast<unsigned char>(*p_) < 0x7f) {
    std::snprintf(found, sizeof found, "'%c'", *p_);
  } else {
    std::snprintf(found, sizeof found, "byte 0x%02x", static_cast<unsigned>(static_cast<unsigned char>(*p_)));
  }
  throw Malformed("expected " + std::string(expected) + ", found " + found + " at column " +
                  std::to_string(p_ - begin_ + 1));
}

void Parser::space() {
  while (p_ < end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\r')) ++p_;
}

void Parser::expect(char c, const char* expected) {
  if (p_ >= end_ || *p_ != c) fail(expected);
  ++p_;
}

std::string_view Parser::string() {
  const char* begin = ++p_;
  for (;;) {
    while (p_ < end_ && plain(static_cast<unsigned char>(*p_))) ++p_;
    if (p_ >= end_) fail("'\"' at the end of the string");
    if (*p_ == '"') {
      ++p_;
      return {begin, static_cast<size_t>(p_ - 1 - begin)};
    }
    if (*p_ == '\\') return escaped(begin);
    utf8();
  }
}

// The slow path: a string with escapes is decoded into storage of its own.
std::string_view Parser::escaped(const char* begin) {
  decoded_.emplace_back(begin, static_cast<size_t>(p_ - begin));
  std::string& out = decoded_.back();
  const auto hex4 = [&]() -> uint32_t {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++p_) {
      const char c = p_ < end_ ? *p_ : '\0';
      uint32_t nibble = 0;
      if (digit(c)) {
        nibble = static_cast<uint32_t>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        nibble = static_cast<uint32_t>(c - 'a' + 10);
      } else if (c >= 'A' && c <= 'F') {
        nibble = static_cast<uint32_t>(c - 'A' + 10);
      } else {
        fail("four hexadecimal digits after \\u");
      }
      code = code * 16 + nibble;
    }
    return code;
  };
  for (;;) {
    const char* from = p_;
    while (p_ < end_ && plain(static_cast<unsigned char>(*p_))) ++p_;
    out.append(from, static_cast<size_t>(p_ - from));
    if (p_ >= end_) fail("'\"' at the end of the string");
    if (*p_ == '"') {
      ++p_;
      return out;
    }
    if (*p_ != '\\') {
      from = p_;
      utf8();
      out.append(from, static_cast<size_t>(p_ - from));
      continue;
    }
    ++p_;
    static constexpr char kFrom[] = "\"\\/bfnrt";
    static constexpr char kTo[] = "\"\\/\b\f\n\r\t";
    const char* simple =
        p_ < end_ && *p_ != '\0' ? static_cast<const char*>(std::memchr(kFrom, *p_, sizeof kFrom - 1)) : nullptr;
    if (simple != nullptr) {
      out += kTo[simple - kFrom];
      ++p_;
      continue;
    }
    if (p_ >= end_ || *p_ != 'u') fail("one of \"\\/bfnrtu after a backslash");
    ++p_;
    uint32_t code = hex4();
    if (code >= 0xd800 && code < 0xdc00) {
      if (end_ - p_ < 2 || p_[0] != '\\' || p_[1] != 'u') fail("the second half of a surrogate pair");
      p_ += 2;
      const uint32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) fail("the second half of a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code <= 0xdfff) {
      fail("the first half of a surrogate pair before its second");
    }
    append_utf8(out, code);
  }
}

// Steps over one multi-byte character; refuses control bytes and ill-formed UTF-8.
void Parser::utf8() {
  const auto lead = static_cast<unsigned char>(*p_);
  if (lead < 0x20) fail("control characters to be escaped in a string");
  int more = 0;
  uint32_t code = 0;
  uint32_t least = 0;
  if (lead >= 0xc2 && lead < 0xe0) {
    more = 1, code = lead & 0x1fu, least = 0x80;
  } else if (lead >= 0xe0 && lead < 0xf0) {
    more = 2, code = lead & 0x0fu, least = 0x800;
  } else if (lead >= 0xf0 && lead < 0xf5) {
    more = 3, code = lead & 0x07u, least = 0x10000;
  } else {
    fail("UTF-8 text");
  }
  if (end_ - p_ <= more) fail("UTF-8 text");
  for (int i = 1; i <= more; ++i) {
    const auto next = static_cast<unsigned char>(p_[i]);
    if ((next & 0xc0) != 0x80) fail("UTF-8 text");
    code = (code << 6) | (next & 0x3fu);
  }
  if (code < least || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) fail("UTF-8 text");
  p_ += more + 1;
}

void Parser::number(Field& field) {
  const char* begin = p_;
  const bool negative = *p_ == '-';
  if (negative) ++p_;
  if (p_ >= end_ || !digit(*p_)) fail("a digit");
  const char* digits = p_;
  int64_t whole = 0;
  while (p_ < end_ && digit(*p_)) {
    if (p_ - digits < 18) whole = whole * 10 + (*p_ - '0');
    ++p_;
  }
  if (*digits == '0' && p_ - digits > 1) {
    p_ = begin;
    fail("a number without leading zeros");
  }
  bool integer = p_ - digits <= 18;
  if (p_ < end_ && *p_ == '.') {
    integer = false;
    ++p_;
    if (p_ >= end_ || !digit(*p_)) fail("a digit after the decimal point");
    while (p_ < end_ && digit(*p_)) ++p_;
  }
  if (p_ < end_ && (*p_ == 'e' || *p_ == 'E')) {
    integer = false;
    ++p_;
    if (p_ < end_ && (*p_ == '+' || *p_ == '-')) ++p_;
    if (p_ >= end_ || !digit(*p_)) fail("a digit in the exponent");
    while (p_ < end_ && digit(*p_)) ++p_;
  }
  field.type = integer ? Type::kInteger : Type::kOther;
  field.number = negative ? -whole : whole;
  field.what = integer ? "a number" : "a number that is not whole or too large";
}

void Parser::literal(std::string_view word) {
  if (static_cast<size_t>(end_ - p_) < word.size() || std::string_view(p_, word.size()) != word) fail("a JSON value");
  p_ += word.size();
}

void Parser::strings(Field& field, Event& event) {
  field.type = Type::kStrings;
  field.what = "a list";
  field.first = static_cast<uint32_t>(event.items.size());
  ++p_;
  space();
  if (p_ < end_ && *p_ == ']') {
    ++p_;
    return;
  }
  for (;;) {
    if (p_ < end_ && *p_ == '"') {
      event.items.push_back(string());
    } else {
      skip(1);
      field.type = Type::kOther;
      field.what = "a list that holds something else";
    }
    space();
    if (p_ < end_ && *p_ == ',') {
      ++p_;
      space();
      continue;
    }
    expect(']', "',' or ']' in the list");
    break;
  }
  field.count = static_cast<uint32_t>(event.items.size()) - field.first;
}

void Parser::value(Field& field, Event& event, bool list) {
  const char c = p_ < end_ ? *p_ : '\0';
  if (c == '"') {
    field.text = string();
    field.type = Type::kString;
    field.what = field.text.empty() ? "an empty string" : "a string";
  } else if (c == '-' || digit(c)) {
    number(field);
  } else if (c == '[' && list) {
    strings(field, event);
  } else if (c == 'n') {
    literal("null");
    field.type = Type::kNull;
    field.what = "null";
  } else {
    field.type = Type::kOther;
    field.what = c == '{' ? "an object" : c == '[' ? "a list" : "true or false";
    skip(0);
  }
}

// Any JSON value, checked and forgotten.
void Parser::skip(int depth) {
  if (depth > kDeepest) fail("values nested at most 64 deep");
  const char c = p_ < end_ ? *p_ : '\0';
  if (c == '"') {
    string();
  } else if (c == '-' || digit(c)) {
    Field ignored;
    number(ignored);
  } else if (c == 't') {
    literal("true");
  } else if (c == 'f') {
    literal("false");
  } else if (c == 'n') {
    literal("null");
  } else if (c == '[' || c == '{') {
    const char close = c == '[' ? ']' : '}';
    ++p_;
    space();
    if (p_ < end_ && *p_ == close) {
      ++p_;
      return;
    }
    for (;;) {
      if (c == '{') {
        if (p_ >= end_ || *p_ != '"') fail("a field name in double quotes");
        string();
        space();
        expect(':', "':' after the field name");
        space();
      }
      skip(depth + 1);
      space();
      if (p_ < end_ && *p_ == ',') {
        ++p_;
        space();
        continue;
      }
      expect(close, c == '[' ? "',' or ']' in the list" : "',' or '}' after the value");
      return;
    }
  } else {
    fail("a JSON value");
  }
}

}  // namespace anabranch::race
