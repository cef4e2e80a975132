// SPDX-License-Identifier: Apache-2.0
// The race detector: for every byte, who wrote it last and who has read it since. Two accesses of which one writes must be
// ordered by a barrier of the block, by a __syncwarp of the warp, by an mbarrier, by a barrier of the cluster, or by being one
// thread's; between clusters nothing orders.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "order.h"
#include "sim.h"

namespace lors::sim {

enum class Access : uint8_t {
  read,
  read_once,  // not coherent: nobody, not even this thread, may write the bytes during the launch
  write,
  atomic,
};

// The moment and the thread of an access.
struct Stamp {
  uint32_t serial = 0;  // of the block, unique in the process
  uint32_t epoch = 0;   // barriers the block has passed
  uint32_t clock = 0;   // the thread's count of synchronisations, or the phase that a bulk copy completes
  uint16_t thread = 0;  // in the block, or kMostThreads + the mbarrier of a bulk copy
  Access kind = Access::read;
  Site site;
};

// The running thread, as the detector sees it.
struct Now {
  Stamp stamp;
  uint32_t valid_from = 0;           // stamps of earlier blocks are of no concern
  const uint32_t* seen = nullptr;    // clock up to which each lane of the warp is known
  const Knowledge* known = nullptr;  // what else is, of the cluster's blocks from `first_serial` on; or null
  uint32_t first_serial = 0;
  bool any_order = false;  // there are mbarriers or clusters, so that a thread may know some of any others' accesses
};

class Shadow {
 public:
  // The description of a conflict, or empty. `needs_value`: bytes that nothing has written are a conflict too.
  std::string access(uint64_t address, int bytes, const Now& now, bool needs_value);
  // An asynchronous copy is a write at its issue, forbids every access while it is in flight, and is a write at its wait.
  std::string begin_copy(uint64_t address, int bytes, const Now& now);
  void end_copy(uint64_t address, int bytes, const Now& now);
  // One side of a bulk copy: allowed to the thread that issues it, as `now` says, and then an access by `copy`.
  std::string bulk_copy(uint64_t address, int bytes, const Now& now, const Stamp& copy);

 private:
  // Accesses that do not conflict with each other: reads, or atomics. Not all are kept, but enough for everything that would
  // conflict with one of them to conflict with one that is.
  struct Group {
    Stamp first, other;
    uint32_t lanes = 0;  // lanes of the warp that accessed at the same clock as `first`; 0: none
    bool has_other = false;
    // With Now::any_order instead: each lane mask of a warp at one clock that is not ordered before another access here.
    struct Entry {
      Stamp stamp;
      uint32_t lanes = 0;
    };
    std::vector<Entry> entries;
  };
  struct Cell {
    Stamp write;  // the last one, not atomic
    Group reads, atomics;
    bool in_flight = false;
  };
  // Cells are as fine as the smallest access of the page so far.
  struct Page {
    int shift = 4;  // of bytes per cell
    std::vector<Cell> cells;
  };
  static constexpr int kPageShift = 10;

  // Calls visit(cell) for every cell of the range until it returns a description.
  template <typename Visit>
  std::string for_cells(uint64_t address, int bytes, Visit visit);
  static std::string check_lanes(const Stamp& first, uint32_t lanes, const char* what, const Now& now);
  static std::string check_group(const Group& group, const char* what, const Now& now);
  static void join_entries(Group& group, const Now& now);
  static void join_group(Group& group, const Now& now);
  static std::string check(const Cell& cell, const Now& now, bool needs_value);
  static void note(Cell& cell, const Now& now);

  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_key_ = ~uint64_t{0};
  Page* last_page_ = nullptr;
};

}  // namespace lors::sim
