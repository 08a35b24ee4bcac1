// Reports as JSON: facts only. anabranch.race._report turns them into words and fixes.
#include <algorithm>
#include <cstdio>

#include "detector.h"

namespace anabranch::race {

namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9fb21c651e98df25u;
  return hash ^ (hash >> 32);
}

void put_number(std::string& out, const char* key, uint64_t value) {
  out += key;
  out += std::to_string(value);
}

}  // namespace

void put_json(std::string& out, std::string_view text) {
  out += '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(byte));
      out += escaped;
    } else {
      out += c;
    }
  }
  out += '"';
}

// What stands for an access in de-duplication: its source line if it has one, else its line in the trace.
uint64_t Detector::code(const Site& site) const {
  return site.source == kNone ? site.line : mix(0x5eed, site.source) | (uint64_t{1} << 63);
}

bool Detector::distinct(uint64_t key) {
  if (reports_.size() >= report_limit_) {
    // Past the limit nothing is kept, so memory stays bounded in a trace where everything races.
    if (seen_.count(key) == 0) ++unreported_;
    return false;
  }
  return seen_.insert(key).second;
}

void Detector::put_name(std::string& out, const Names& names, uint32_t id) const {
  if (id == kNone) {
    out += "null";
  } else {
    put_json(out, names[id]);
  }
}

void Detector::put_site(std::string& out, const Site& site) const {
  put_number(out, "\"line\":", site.line);
  out += ",\"source\":";
  put_name(out, sources_, site.source);
  out += ",\"thread\":";
  put_name(out, thread_names_, site.thread);
}

void Detector::put_actor(std::string& out, const Actor& actor, uint32_t buffer, bool write) const {
  static constexpr const char* kVia[] = {"op", "replay", "host"};
  out += "{\"do\":\"";
  out += kVia[static_cast<size_t>(actor.via)];
  out += write ? "\",\"mode\":\"write\",\"buffer\":" : "\",\"mode\":\"read\",\"buffer\":";
  put_name(out, buffer_names_, buffer);
  out += ",\"stream\":";
  put_name(out, stream_names_, actor.stream);
  out += ",\"graph\":";
  put_name(out, graph_names_, actor.graph);
  out += ",\"lock\":";
  put_name(out, lock_names_, actor.lock);
  put_number(out, ",\"item\":", actor.tick);
  out += ',';
  put_site(out, actor.site);
  out += '}';
}

// Where a buffer came from, and where it ended.
void Detector::put_origin(std::string& out, uint32_t id) const {
  const Instance& instance = memory_[id];
  out += "{\"declared\":";
  out += instance.declared ? "true" : "false";
  out += ",\"stream\":";
  put_name(out, stream_names_, instance.alloc_stream);
  out += ",\"reuses\":";
  put_name(out, buffer_names_, instance.reused);
  out += ',';
  put_site(out, instance.alloc);
  out += ",\"freed\":";
  if (instance.freed) {
    out += '{';
    put_site(out, instance.free);
    out += '}';
  } else {
    out += "null";
  }
  out += '}';
}

void Detector::race(const Conflict& conflict, const Range& range, const Actor& actor, const Clock& clock) {
  ++races_;
  const Entry& earlier = conflict.earlier;
  const Instance& now = memory_[range.instance];
  const Instance& then = memory_[earlier.instance];
  const uint64_t start = conflict.start - std::min(conflict.start, now.base);
  // A cell may reach beyond the buffer that this access names as a whole.
  const uint64_t end = conflict.stop == kEnd ? kEnd : conflict.stop - now.base;
  uint64_t key = mix(1, now.name);
  key = mix(key, then.name);
  key = mix(key, start);
  key = mix(key, end);
  key = mix(key, code(earlier.actor.site));
  key = mix(key, code(actor.site));
  if (!distinct(key)) return;
  std::string out = "{\"kind\":\"race\",\"verdict\":\"race\",\"buffer\":";
  put_name(out, buffer_names_, now.name);
  put_number(out, ",\"start\":", start);
  out += ",\"stop\":" + (end == kEnd ? std::string("null") : std::to_string(end));
  out += ",\"allocated\":";
  put_origin(out, range.instance);
  out += ",\"first_allocated\":";
  if (earlier.instance == range.instance) {
    out += "null";
  } else {
    put_origin(out, earlier.instance);
  }
  out += ",\"first\":";
  put_actor(out, earlier.actor, then.name, earlier.write);
  out += ",\"second\":";
  put_actor(out, actor, now.name, range.write);
  // How far the second access is ordered after the first one's stream or thread.
  put_number(out, ",\"covered\":", clock.at(earlier.actor.component));
  out += '}';
  reports_.push_back(std::move(out));
}

void Detector::capture_race(const Capture& capture, const Unsafe& call, bool capture_first) {
  ++races_;
  uint64_t key = mix(2, code(capture.site));
  key = mix(key, code(call.site));
  if (!distinct(key)) return;
  const auto side = [&](bool captures) {
    std::string out = captures ? "{\"do\":\"begin_capture\",\"stream\":" : "{\"do\":\"unsafe_call\",\"stream\":";
    put_name(out, stream_names_, captures ? capture.stream_name : kNone);
    out += ',';
    put_site(out, captures ? capture.site : call.site);
    return out + '}';
  };
  std::string out = "{\"kind\":\"capture\",\"verdict\":\"race\",\"first\":" + side(capture_first);
  out += ",\"second\":" + side(!capture_first) + '}';
  reports_.push_back(std::move(out));
}

void Detector::stale(const char* kind, const Site& released, uint32_t buffer, uint32_t stream, const char* what,
                     const Actor* actor, uint32_t instance) {
  ++stales_;
  uint64_t key = 3;
  for (const char* c = kind; *c != '\0'; ++c) key = mix(key, static_cast<unsigned char>(*c));
  key = mix(key, buffer);
  key = mix(key, stream);
  key = mix(key, code(released));
  key = mix(key, code(site_));
  if (!distinct(key)) return;
  std::string out = std::string("{\"kind\":\"") + kind + "\",\"verdict\":\"stale\",\"buffer\":";
  put_name(out, buffer_names_, buffer);
  out += ",\"released\":{";
  put_site(out, released);
  out += "},\"use\":{\"do\":\"";
  out += actor == nullptr ? what : actor->via == Via::kHost ? "host" : actor->via == Via::kReplay ? "replay" : "op";
  out += "\",\"mode\":";
  out += actor == nullptr ? "null" : std::string("\"") + what + '"';
  out += ",\"stream\":";
  put_name(out, stream_names_, stream);
  out += ",\"graph\":";
  put_name(out, graph_names_, actor == nullptr ? kNone : actor->graph);
  out += ',';
  put_site(out, site_);
  out += "},\"allocated\":";
  if (instance == kNone) {
    out += "null,\"owner\":null";
  } else {
    put_origin(out, instance);
    out += ",\"owner\":";
    const uint32_t owner = memory_.owner(instance);
    put_name(out, buffer_names_, owner == kNone || owner == instance ? kNone : memory_[owner].name);
  }
  out += '}';
  reports_.push_back(std::move(out));
}

std::string Detector::summary() const {
  std::string out = "{\"verdict\":\"";
  out += races_ != 0 ? "race" : stales_ != 0 ? "stale" : "clean";
  put_number(out, "\",\"lines\":", line_);
  put_number(out, ",\"events\":", events_);
  put_number(out, ",\"conflicts\":", races_);
  put_number(out, ",\"stale_uses\":", stales_);
  put_number(out, ",\"threads\":", order_.threads());
  put_number(out, ",\"streams\":", order_.streams());
  put_number(out, ",\"live_buffers\":", memory_.live());
  put_number(out, ",\"unreported\":", unreported_);
  out += ",\"reports\":[";
  for (size_t i = 0; i < reports_.size(); ++i) {
    if (i != 0) out += ',';
    out += reports_[i];
  }
  return out + "]}";
}

}  // namespace anabranch::race
