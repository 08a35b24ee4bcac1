#include "memory.h"

#include <algorithm>
#include <iterator>

namespace anabranch::race {

namespace {

uint64_t add(uint64_t base, uint64_t offset) {
  return offset >= kEnd - base ? kEnd : base + offset;
}

bool same(const std::vector<Entry>& a, const std::vector<Entry>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].actor.component != b[i].actor.component || a[i].actor.tick != b[i].actor.tick ||
        a[i].write != b[i].write || a[i].released != b[i].released || a[i].instance != b[i].instance) {
      return false;
    }
  }
  return true;
}

}  // namespace

uint32_t Memory::current(uint32_t name, const Site& site) {
  const uint32_t instance = known(name);
  return instance != kNone ? instance : make(name, site);
}

uint32_t Memory::make(uint32_t name, const Site& site) {
  uint32_t id;
  if (spare_instances_.empty()) {
    id = static_cast<uint32_t>(instances_.size());
    instances_.emplace_back();
  } else {
    id = spare_instances_.back();
    spare_instances_.pop_back();
    instances_[id] = Instance{};
  }
  uint32_t storage;
  if (spare_storages_.empty()) {
    storage = static_cast<uint32_t>(storages_.size());
    storages_.emplace_back();
  } else {
    storage = spare_storages_.back();
    spare_storages_.pop_back();
  }
  storages_[storage].cells.try_emplace(0);
  storages_[storage].holds = 0;
  storages_[storage].instances = 1;
  storages_[storage].owner = id;
  Instance& made = instances_[id];
  made.name = name;
  made.storage = storage;
  made.alloc = site;
  ++live_;
  bind(name, id);
  return id;
}

void Memory::bind(uint32_t name, uint32_t instance) {
  if (name >= bound_.size()) bound_.resize(name + 1, kNone);
  const uint32_t before = bound_[name];
  bound_[name] = instance;
  hold(instance);
  if (before != kNone) let_go(before);
}

uint32_t Memory::alloc(uint32_t name, uint32_t stream, const Site& site, const Range* reused) {
  const uint32_t before = known(name);
  if (reused == nullptr && before != kNone && !instances_[before].declared && !instances_[before].accessed &&
      !instances_[before].freed) {
    // So far the name was only mentioned (by a graph, say): this event tells where its block comes from.
    Instance& named = instances_[before];
    named.alloc = site;
    named.alloc_stream = stream;
    named.declared = true;
    return before;
  }
  if (reused != nullptr) hold(reused->instance);  // it may be what `name` meant, and must outlive the rebinding
  const uint32_t id = make(name, site);
  if (reused != nullptr) {
    const Instance& old = instances_[reused->instance];
    const uint64_t start = add(old.base, reused->start);
    const uint64_t stop = std::min(add(old.base, old.size), add(old.base, reused->stop));
    const uint32_t storage = old.storage;
    Instance& made = instances_[id];
    leave(made.storage);  // the fresh block that make() gave it
    made.storage = storage;
    made.base = start;
    made.size = stop == kEnd ? kEnd : stop - std::min(start, stop);
    made.reused = old.name;
    Storage& bytes = storages_[storage];
    ++bytes.instances;
    ++bytes.holds;
    bytes.owner = id;
    if (start < stop) {
      const auto first = cut(bytes.cells, start);
      const auto last = cut(bytes.cells, stop);
      for (auto cell = first; cell != last; ++cell) {
        std::vector<Entry>& entries = cell->second;
        const auto done =
            std::stable_partition(entries.begin(), entries.end(), [](const Entry& e) { return !e.released; });
        drop(entries, static_cast<size_t>(done - entries.begin()));
      }
      merge(bytes.cells, first, last);
    }
    let_go(reused->instance);
  }
  instances_[id].alloc_stream = stream;
  instances_[id].declared = true;
  return id;
}

void Memory::free(uint32_t instance, const Site& site, const std::vector<const Clock*>& clocks) {
  Instance& gone = instances_[instance];
  gone.freed = true;
  gone.free = site;
  gone.recorded = {};
  --live_;
  Cells& cells = storages_[gone.storage].cells;
  const uint64_t stop = add(gone.base, gone.size);
  if (gone.base >= stop) return;
  const auto first = cut(cells, gone.base);
  const auto last = cut(cells, stop);
  for (auto cell = first; cell != last; ++cell) {
    for (Entry& e : cell->second) {
      for (const Clock* clock : clocks) {
        if (clock->covers(e.actor.component, e.actor.tick)) {
          e.released = true;
          break;
        }
      }
    }
  }
  merge(cells, first, last);
}

void Memory::touch(const Range& range, const Actor& actor, const Clock& clock, std::vector<Conflict>& conflicts) {
  if (range.empty()) return;
  Instance& instance = instances_[range.instance];
  instance.accessed = true;
  Cells& cells = storages_[instance.storage].cells;
  const uint64_t start = add(instance.base, range.start);
  const uint64_t stop = range.stop == kEnd ? add(instance.base, instance.size) : add(instance.base, range.stop);
  if (start >= stop) return;
  before_.clear();
  if (cells.size() == 1 && start == 0 && stop == kEnd) {
    touch_cell(0, kEnd, cells.begin()->second, range, actor, clock, conflicts);
    return;
  }
  const auto first = cut(cells, start);
  const auto last = cut(cells, stop);
  for (auto cell = first; cell != last; ++cell) {
    touch_cell(cell->first, end_of(cells, cell), cell->second, range, actor, clock, conflicts);
  }
  merge(cells, first, last);
}

void Memory::touch_cell(uint64_t start, uint64_t stop, std::vector<Entry>& entries, const Range& range,
                        const Actor& actor, const Clock& clock, std::vector<Conflict>& conflicts) {
  here_.clear();
  next_ = 0;
  size_t kept = 0;
  bool mine = false;
  for (size_t i = 0; i < entries.size(); ++i) {
    Entry& e = entries[i];
    const bool ordered = clock.covers(e.actor.component, e.actor.tick);
    if (!ordered && (e.write || range.write)) conflict(e, start, stop, conflicts);
    const bool self = ordered && e.write && e.actor.component == actor.component && e.actor.tick == actor.tick;
    mine |= self && e.instance == range.instance;
    if (ordered && (range.write || !e.write) && !(self && mine)) {
      unpin(e.instance);
      continue;
    }
    if (kept != i) entries[kept] = e;
    ++kept;
  }
  before_.swap(here_);
  entries.resize(kept);
  if (mine) return;  // this event's own write stands for its read, or for the same write named twice
  ++instances_[range.instance].pins;
  Entry entry;
  entry.actor = actor;
  entry.instance = range.instance;
  entry.write = range.write;
  entries.push_back(entry);
}

// Adjacent cells that hold the same access make one conflict. Cells hold their entries in the same order, so a look at
// the next few conflicts of the cell before finds it.
void Memory::conflict(const Entry& e, uint64_t start, uint64_t stop, std::vector<Conflict>& conflicts) {
  for (size_t i = next_; i < before_.size() && i < next_ + 8; ++i) {
    Conflict& c = conflicts[before_[i]];
    if (c.stop == start && c.earlier.actor.component == e.actor.component && c.earlier.actor.tick == e.actor.tick &&
        c.earlier.write == e.write && c.earlier.instance == e.instance) {
      c.stop = stop;
      here_.push_back(before_[i]);
      next_ = i + 1;
      return;
    }
  }
  here_.push_back(static_cast<uint32_t>(conflicts.size()));
  conflicts.push_back(Conflict{e, start, stop});
}

uint64_t Memory::end_of(const Cells& cells, Cells::const_iterator cell) {
  ++cell;
  return cell == cells.end() ? kEnd : cell->first;
}

// Makes `at` a boundary between cells; returns the cell that starts there.
Memory::Cells::iterator Memory::cut(Cells& cells, uint64_t at) {
  if (at == kEnd) return cells.end();
  const auto next = cells.upper_bound(at);
  const auto found = std::prev(next);
  if (found->first == at) return found;
  for (const Entry& e : found->second) ++instances_[e.instance].pins;
  return cells.emplace_hint(next, at, found->second);
}

// Joins neighbours that hold the same accesses, from the cell before `first` to the one at `last`.
void Memory::merge(Cells& cells, Cells::iterator first, Cells::iterator last) {
  if (cells.size() == 1) return;
  auto kept = first == cells.begin() ? first : std::prev(first);
  const auto stop = last == cells.end() ? last : std::next(last);
  for (auto cell = std::next(kept); cell != stop;) {
    if (same(kept->second, cell->second)) {
      drop(cell->second, 0);
      cell = cells.erase(cell);
    } else {
      kept = cell++;
    }
  }
}

void Memory::drop(std::vector<Entry>& entries, size_t from) {
  for (size_t i = from; i < entries.size(); ++i) unpin(entries[i].instance);
  entries.resize(from);
}

void Memory::hold(uint32_t instance) {
  Instance& held = instances_[instance];
  if (held.holds++ == 0) ++storages_[held.storage].holds;
}

void Memory::let_go(uint32_t instance) {
  Instance& held = instances_[instance];
  if (--held.holds != 0) return;
  if (!held.freed) --live_;
  Storage& bytes = storages_[held.storage];
  if (--bytes.holds == 0) {
    // Nothing can name these bytes any more: their history is of no use. Its entries may pin this very instance, so
    // the pin below keeps it until the end.
    ++held.pins;
    for (auto& [start, entries] : bytes.cells) drop(entries, 0);
    unpin(instance);
    return;
  }
  retire(instance);
}

void Memory::unpin(uint32_t instance) {
  --instances_[instance].pins;
  retire(instance);
}

// Frees the slot of an instance that nothing mentions any more.
void Memory::retire(uint32_t instance) {
  Instance& gone = instances_[instance];
  if (gone.holds != 0 || gone.pins != 0) return;
  if (storages_[gone.storage].owner == instance) storages_[gone.storage].owner = kNone;
  leave(gone.storage);
  spare_instances_.push_back(instance);
}

void Memory::leave(uint32_t storage) {
  Storage& bytes = storages_[storage];
  if (--bytes.instances != 0) return;
  bytes.cells.erase(std::next(bytes.cells.begin()), bytes.cells.end());
  bytes.cells.begin()->second.clear();
  bytes.owner = kNone;
  spare_storages_.push_back(storage);
}

}  // namespace anabranch::race
