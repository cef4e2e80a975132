// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>
#include <bit>

#include "block.h"

namespace lors::sim {

namespace {

bool writes(Access kind) { return kind == Access::write || kind == Access::atomic; }

bool current(const Stamp& stamp, const Now& now) { return stamp.serial >= now.valid_from && stamp.serial != 0; }

// Whether everything up to `stamp` happened before the running thread's next step.
bool ordered(const Stamp& stamp, const Now& now) {
  if (stamp.serial == now.stamp.serial) {
    if (stamp.epoch < now.stamp.epoch || stamp.thread == now.stamp.thread) return true;
    if (stamp.thread / 32 == now.stamp.thread / 32 && now.seen[stamp.thread % 32] >= stamp.clock) return true;
  }
  if (now.known == nullptr || stamp.serial < now.first_serial) return false;
  return now.known->covers(stamp.serial - now.first_serial, stamp.thread, stamp.epoch, stamp.clock);
}

std::string conflict(const char* what, const Stamp& with, const Now& now) {
  const bool same_block = with.serial == now.stamp.serial;
  std::string text = "race: ";
  text += now.stamp.kind == Access::atomic ? "atomic on" : writes(now.stamp.kind) ? "write of" : "read of";
  text += " bytes that ";
  if (with.thread >= kMostThreads)
    return text + "the bulk copy at " + describe_site(with.site) + (writes(with.kind) ? " writes" : " reads") +
           ", and its mbarrier has not been waited for";
  text += same_block ? "thread " + std::to_string(with.thread) : "another block";
  text += std::string(" ") + what + " at " + describe_site(with.site);
  text += same_block ? ", with no barrier between" : " in the same launch";
  if (now.any_order && !same_block) text += ", with no barrier of a cluster between";
  return text;
}

}  // namespace

template <typename Visit>
std::string Shadow::for_cells(uint64_t address, int bytes, Visit visit) {
  int shift = 0;
  while ((2 << shift) <= bytes && (address & ((2u << shift) - 1)) == 0 && shift < 4) ++shift;
  while (bytes > 0) {
    const uint64_t key = address >> kPageShift, offset = address & ((1u << kPageShift) - 1);
    if (key != last_key_) {
      last_page_ = &pages_[key];
      last_key_ = key;
    }
    Page& page = *last_page_;
    if (page.cells.empty()) {
      page.shift = shift;
      page.cells.resize(size_t{1} << (kPageShift - shift));
    } else if (shift < page.shift) {
      std::vector<Cell> finer(size_t{1} << (kPageShift - shift));
      for (size_t i = 0; i < finer.size(); ++i) finer[i] = page.cells[i >> (page.shift - shift)];
      page.cells = std::move(finer);
      page.shift = shift;
    }
    const int here = std::min<int>(bytes, (1 << kPageShift) - static_cast<int>(offset));
    const size_t end = (offset + static_cast<uint64_t>(here) - 1) >> page.shift;
    for (size_t i = offset >> page.shift; i <= end; ++i)
      if (std::string problem = visit(page.cells[i]); !problem.empty()) return problem;
    address += static_cast<uint64_t>(here);
    bytes -= here;
  }
  return {};
}

std::string Shadow::check_lanes(const Stamp& first, uint32_t lanes, const char* what, const Now& now) {
  Stamp each = first;
  if (first.thread >= kMostThreads) return ordered(first, now) ? std::string() : conflict(what, first, now);
  for (; lanes != 0; lanes &= lanes - 1) {
    each.thread = static_cast<uint16_t>(first.thread / 32 * 32 + std::countr_zero(lanes));
    if (!ordered(each, now)) return conflict(what, each, now);
  }
  return {};
}

std::string Shadow::check_group(const Group& group, const char* what, const Now& now) {
  for (const Group::Entry& entry : group.entries) {
    if (!current(entry.stamp, now)) continue;
    if (entry.stamp.kind == Access::read_once) return conflict("reads by load_global_once", entry.stamp, now);
    if (std::string problem = check_lanes(entry.stamp, entry.lanes, what, now); !problem.empty()) return problem;
  }
  if (group.lanes == 0 || !current(group.first, now)) return {};
  if (group.first.kind == Access::read_once) return conflict("reads by load_global_once", group.first, now);
  if (group.has_other && group.other.kind == Access::read_once) return conflict("reads by load_global_once", group.other, now);
  if (group.has_other && !ordered(group.other, now)) return conflict(what, group.other, now);
  return check_lanes(group.first, group.lanes, what, now);
}

// Whatever is ordered after this access is ordered after those that are ordered before it: they need not be kept.
void Shadow::join_entries(Group& group, const Now& now) {
  const Stamp& stamp = now.stamp;
  const uint32_t lane = 1u << (stamp.thread % 32);
  std::erase_if(group.entries, [&](const Group::Entry& entry) {
    return !current(entry.stamp, now) ||
           (entry.stamp.kind != Access::read_once && check_lanes(entry.stamp, entry.lanes, "", now).empty());
  });
  for (Group::Entry& entry : group.entries) {
    const Stamp& e = entry.stamp;
    if (e.kind == Access::read_once) return;  // the strictest kind stays on record
    if (e.serial == stamp.serial && e.epoch == stamp.epoch && e.clock == stamp.clock && e.kind == stamp.kind &&
        e.thread / 32 == stamp.thread / 32 && stamp.thread < kMostThreads) {
      entry.lanes |= lane;
      return;
    }
  }
  group.entries.push_back({stamp, lane});
}

void Shadow::join_group(Group& group, const Now& now) {
  if (now.any_order) return join_entries(group, now);
  const Stamp& stamp = now.stamp;
  const uint32_t lane = 1u << (stamp.thread % 32);
  const auto start_again = [&] {
    group.first = stamp;
    group.lanes = lane;
    group.has_other = false;
  };
  if (group.lanes == 0 || !current(group.first, now)) return start_again();
  if (group.has_other && group.other.serial != group.first.serial) return;  // of two blocks: nothing is ordered after both
  if (group.first.serial != stamp.serial) {
    group.other = stamp;
    group.has_other = true;
    return;
  }
  if (group.first.kind == Access::read_once) return;  // the strictest kind stays on record
  if (group.first.epoch != stamp.epoch) return start_again();
  if (group.has_other) return;  // of two warps, one epoch: nothing in it is ordered after both
  const bool same_warp = group.first.thread / 32 == stamp.thread / 32;
  if (same_warp && group.first.clock == stamp.clock) {
    group.lanes |= lane;
    if (stamp.kind == Access::read_once) group.first.kind = stamp.kind;
  } else if (same_warp && ordered(group.first, now)) {
    start_again();  // a full __syncwarp lies between
  } else {
    group.other = stamp;
    group.has_other = true;
  }
}

std::string Shadow::check(const Cell& cell, const Now& now, bool needs_value) {
  const Access kind = now.stamp.kind;
  const bool written = current(cell.write, now);
  if (cell.in_flight && written)
    return std::string(writes(kind) ? "write of" : "read of") + " bytes that the cp.async of thread " +
           std::to_string(cell.write.thread) + " at " + describe_site(cell.write.site) +
           " may still be writing: it has not been waited for";
  if (needs_value && !written) return "read of shared memory that this block has not written";
  if (kind == Access::read_once) {
    const Stamp& atomic =
        cell.atomics.lanes != 0 || cell.atomics.entries.empty() ? cell.atomics.first : cell.atomics.entries.back().stamp;
    if (written || current(atomic, now))
      return conflict("wrote (load_global_once needs bytes that nobody writes)", written ? cell.write : atomic, now);
  }
  if (written && !ordered(cell.write, now)) return conflict("wrote", cell.write, now);
  if (writes(kind))
    if (std::string problem = check_group(cell.reads, "read", now); !problem.empty()) return problem;
  return kind == Access::atomic ? std::string() : check_group(cell.atomics, "changed atomically", now);
}

void Shadow::note(Cell& cell, const Now& now) {
  if (now.stamp.kind == Access::atomic) return join_group(cell.atomics, now);
  if (now.stamp.kind != Access::write) return join_group(cell.reads, now);
  // Whatever is ordered after this write is ordered after everything before it.
  cell = Cell();
  cell.write = now.stamp;
}

std::string Shadow::access(uint64_t address, int bytes, const Now& now, bool needs_value) {
  return for_cells(address, bytes, [&](Cell& cell) {
    std::string problem = check(cell, now, needs_value);
    if (problem.empty()) note(cell, now);
    return problem;
  });
}

std::string Shadow::begin_copy(uint64_t address, int bytes, const Now& now) {
  return for_cells(address, bytes, [&](Cell& cell) {
    std::string problem = check(cell, now, false);
    if (problem.empty()) {
      note(cell, now);
      cell.in_flight = true;
    }
    return problem;
  });
}

std::string Shadow::bulk_copy(uint64_t address, int bytes, const Now& now, const Stamp& copy) {
  const Now by_copy{copy, now.valid_from, now.seen, now.known, now.first_serial, true};
  return for_cells(address, bytes, [&](Cell& cell) {
    // Ordinary accesses and bulk copies see memory through different proxies.
    if (copy.kind == Access::write && current(cell.write, now) && cell.write.thread < kMostThreads)
      return "a bulk copy over bytes that thread " + std::to_string(cell.write.thread) + " wrote at " +
             describe_site(cell.write.site) + " needs a fence.proxy.async, which ptx.h does not have";
    std::string problem = check(cell, now, false);
    if (problem.empty()) note(cell, by_copy);
    return problem;
  });
}

void Shadow::end_copy(uint64_t address, int bytes, const Now& now) {
  for_cells(address, bytes, [&](Cell& cell) {
    cell.in_flight = false;
    cell.write = now.stamp;
    return std::string();
  });
}

}  // namespace lors::sim
