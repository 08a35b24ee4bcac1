// Shadow state: which accesses of which bytes a later access could still race with.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "clock.h"
#include "names.h"

namespace anabranch::race {

inline constexpr uint64_t kEnd = ~uint64_t{0};  // end of a buffer whose size no event gives

// Where an event stands: its line, its "source" (kNone: none given) and the host thread that issued it.
struct Site {
  uint64_t line = 0;
  uint32_t source = kNone;
  uint32_t thread = kNone;
};

enum class Via : uint8_t { kOp, kReplay, kHost };

// Who accesses: one event, at one point of the order.
struct Actor {
  uint32_t component = 0;  // of the stream, or of the thread for a host access
  uint64_t tick = 0;
  Site site;
  uint32_t stream = kNone;  // name as the event gave it
  uint32_t graph = kNone;
  uint32_t lock = kNone;  // innermost lock that the issuing thread held
  Via via = Via::kOp;
};

struct Entry {
  Actor actor;
  uint32_t instance = kNone;
  bool write = false;
  bool released = false;  // the allocator hands the bytes out only after this access is done
};

// One life of a buffer name: from its alloc (or first use) to its free, and after.
struct Instance {
  uint32_t name = kNone;
  uint32_t storage = kNone;
  uint64_t base = 0;     // first byte in the storage
  uint64_t size = kEnd;  // kEnd: unknown
  Site alloc;
  uint32_t alloc_stream = kNone;  // name; kNone for host memory
  Site free;
  std::vector<uint32_t> recorded;  // streams given to record_stream
  uint32_t reused = kNone;         // name of the buffer whose bytes these were
  uint32_t holds = 0;              // its name while it means it, and graphs that baked it in
  uint32_t pins = 0;               // entries that refer here
  bool declared = false;           // came from an alloc, not from first use
  bool accessed = false;
  bool freed = false;
};

// A half-open byte range of an instance.
struct Range {
  uint32_t instance = kNone;
  uint64_t start = 0;
  uint64_t stop = kEnd;
  bool write = false;

  bool empty() const { return start >= stop; }
};

struct Conflict {
  Entry earlier;
  uint64_t start = 0;  // bytes of the storage
  uint64_t stop = 0;
};

// Buffers, the bytes behind them, and per byte range the accesses that still matter.
//
// A range keeps an antichain: an access leaves when a later one that conflicts with at least as much is ordered after
// it, because whatever is unordered with the one that left is unordered with the one that stayed. So a range holds at
// most two entries a stream or thread, however long the trace; a storage goes when no buffer refers to it.
class Memory {
 public:
  Instance& operator[](uint32_t instance) { return instances_[instance]; }
  const Instance& operator[](uint32_t instance) const { return instances_[instance]; }

  // The instance that `name` means now; made at first use.
  uint32_t current(uint32_t name, const Site& site);
  // What `name` means now, or kNone.
  uint32_t known(uint32_t name) const { return name < bound_.size() ? bound_[name] : kNone; }

  // A new block for `name`. With `reused`, its bytes [start, stop) of that instance's block.
  uint32_t alloc(uint32_t name, uint32_t stream, const Site& site, const Range* reused);
  // Ends `instance`: marks what `clocks` cover as done before the bytes can be handed out again.
  void free(uint32_t instance, const Site& site, const std::vector<const Clock*>& clocks);

  // Records an access and adds to `conflicts` every earlier one that `clock` does not cover.
  void touch(const Range& range, const Actor& actor, const Clock& clock, std::vector<Conflict>& conflicts);

  // The instance that was last given the bytes of `instance`; kNone when it is gone.
  uint32_t owner(uint32_t instance) const { return storages_[instances_[instance].storage].owner; }

  // A held instance can be named by a later event; a storage without a held instance forgets its history.
  void hold(uint32_t instance);
  void let_go(uint32_t instance);

  uint64_t live() const { return live_; }

 private:
  // What still matters of the bytes from a key up to the next key (or kEnd). The first key is 0.
  using Cells = std::map<uint64_t, std::vector<Entry>>;
  struct Storage {
    Cells cells;
    uint32_t holds = 0;      // held instances
    uint32_t instances = 0;  // instances at all
    uint32_t owner = kNone;
  };

  uint32_t make(uint32_t name, const Site& site);
  void bind(uint32_t name, uint32_t instance);
  void unpin(uint32_t instance);
  void retire(uint32_t instance);
  void leave(uint32_t storage);
  static uint64_t end_of(const Cells& cells, Cells::const_iterator cell);
  Cells::iterator cut(Cells& cells, uint64_t at);
  void merge(Cells& cells, Cells::iterator first, Cells::iterator last);
  void touch_cell(uint64_t start, uint64_t stop, std::vector<Entry>& entries, const Range& range, const Actor& actor,
                  const Clock& clock, std::vector<Conflict>& conflicts);
  void conflict(const Entry& entry, uint64_t start, uint64_t stop, std::vector<Conflict>& conflicts);
  void drop(std::vector<Entry>& entries, size_t from);

  std::vector<Instance> instances_;
  std::vector<uint32_t> spare_instances_;
  std::vector<Storage> storages_;
  std::vector<uint32_t> spare_storages_;
  std::vector<uint32_t> bound_;  // by name
  uint64_t live_ = 0;
  std::vector<uint32_t> before_, here_;  // conflicts that reach the end of the cell before, and of this one
  size_t next_ = 0;                      // where in before_ this cell's next conflict is likely to be
};

}  // namespace anabranch::race
