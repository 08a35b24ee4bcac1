// Interned names: every stream, thread, buffer, ... is a small number inside the checker.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

namespace anabranch::race {

inline constexpr uint32_t kNone = 0xffffffffu;

class Names {
 public:
  // The number of `text`, the same one each time; numbers count up from 0.
  uint32_t intern(std::string_view text) {
    if ((texts_.size() + 1) * 2 > slots_.size()) grow();
    const uint64_t hash = mix(text);
    const size_t mask = slots_.size() - 1;
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
      const Slot& slot = slots_[at];
      if (slot.id == kNone) {
        slots_[at] = Slot{static_cast<uint32_t>(hash >> 32), static_cast<uint32_t>(texts_.size())};
        texts_.push_back(store(text));
        return slots_[at].id;
      }
      // The upper half of the hash sits beside the number, so a miss rarely touches the text.
      if (slot.tag == static_cast<uint32_t>(hash >> 32) && texts_[slot.id] == text) return slot.id;
    }
  }

  // The number of `text`, or kNone when it was never interned.
  uint32_t find(std::string_view text) const {
    if (slots_.empty()) return kNone;
    const uint64_t hash = mix(text);
    const size_t mask = slots_.size() - 1;
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
      const Slot& slot = slots_[at];
      if (slot.id == kNone) return kNone;
      if (slot.tag == static_cast<uint32_t>(hash >> 32) && texts_[slot.id] == text) return slot.id;
    }
  }

  std::string_view operator[](uint32_t id) const { return texts_[id]; }
  uint32_t size() const { return static_cast<uint32_t>(texts_.size()); }

 private:
  struct Slot {
    uint32_t tag = 0;
    uint32_t id = kNone;
  };

  static uint64_t mix(std::string_view text) {
    uint64_t hash = 0x9e3779b97f4a7c15u ^ text.size();
    const char* p = text.data();
    size_t left = text.size();
    while (left >= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      hash = step(hash, word);
      p += 8;
      left -= 8;
    }
    uint64_t word = 0;
    std::memcpy(&word, p, left);
    hash = step(hash, word);
    return step(hash, 0x9fb21c651e98df25u);
  }

  // The two halves of a 128-bit product, folded: every bit of the word reaches every bit of the hash.
  static uint64_t step(uint64_t hash, uint64_t word) {
    const auto wide = static_cast<unsigned __int128>(hash ^ word) * 0xd6e8feb86659fd93u;
    return static_cast<uint64_t>(wide) ^ static_cast<uint64_t>(wide >> 64);
  }

  void grow() {
    std::vector<Slot> bigger(slots_.empty() ? 64 : slots_.size() * 2);
    const size_t mask = bigger.size() - 1;
    for (const Slot& slot : slots_) {
      if (slot.id == kNone) continue;
      size_t at = mix(texts_[slot.id]) & mask;
      while (bigger[at].id != kNone) at = (at + 1) & mask;
      bigger[at] = slot;
    }
    slots_.swap(bigger);
  }

  // Texts live in blocks that never move: the views stay valid.
  std::string_view store(std::string_view text) {
    if (text.size() > room_) {
      room_ = text.size() > kBlock ? text.size() : kBlock;
      blocks_.push_back(std::make_unique<char[]>(room_));
      next_ = blocks_.back().get();
    }
    if (!text.empty()) std::memcpy(next_, text.data(), text.size());
    std::string_view kept(next_, text.size());
    next_ += text.size();
    room_ -= text.size();
    return kept;
  }

  static constexpr size_t kBlock = 4096;
  std::vector<Slot> slots_;
  std::vector<std::string_view> texts_;
  std::vector<std::unique_ptr<char[]>> blocks_;
  char* next_ = nullptr;
  size_t room_ = 0;
};

}  // namespace anabranch::race
