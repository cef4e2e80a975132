// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>

#include "block.h"

namespace lors::sim {

namespace {

bool writes(Access kind) { return kind == Access::write || kind == Access::atomic; }

bool current(const Stamp& stamp, const Now& now) { return stamp.serial >= now.valid_from && stamp.serial != 0; }

// Whether everything up to `stamp` happened before the running thread's next step.
bool ordered(const Stamp& stamp, const Now& now) {
  if (stamp.serial != now.stamp.serial) return false;
  if (stamp.epoch < now.stamp.epoch || stamp.thread == now.stamp.thread) return true;
  return stamp.thread / 32 == now.stamp.thread / 32 && now.seen[stamp.thread % 32] >= stamp.clock;
}

std::string conflict(const char* what, const Stamp& with, const Now& now) {
  const bool same_block = with.serial == now.stamp.serial;
  std::string text = "race: ";
  text += now.stamp.kind == Access::atomic ? "atomic on" : writes(now.stamp.kind) ? "write of" : "read of";
  text += " bytes that ";
  text += same_block ? "thread " + std::to_string(with.thread) : "another block";
  text += std::string(" ") + what + " at " + describe_site(with.site);
  text += same_block ? ", with no barrier between" : " in the same launch";
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

std::string Shadow::check(const Cell& cell, const Now& now, bool needs_value) {
  const Access kind = now.stamp.kind;
  if (cell.in_flight && current(cell.write, now))
    return std::string(writes(kind) ? "write of" : "read of") + " bytes that the cp.async of thread " +
           std::to_string(cell.write.thread) + " at " + describe_site(cell.write.site) +
           " may still be writing: it has not been waited for";
  const bool written = current(cell.write, now);
  if (needs_value && !written) return "read of shared memory that this block has not written";
  if (written) {
    if (kind == Access::read_once) return conflict("wrote; load_global_once needs bytes nobody writes,", cell.write, now);
    const bool both_atomic = kind == Access::atomic && cell.write.kind == Access::atomic;
    if (!both_atomic && !ordered(cell.write, now)) return conflict("wrote", cell.write, now);
  }
  if (writes(kind) && cell.reader_lanes != 0 && current(cell.reader, now)) {
    for (const Stamp* reader : {&cell.reader, &cell.other}) {
      if (reader == &cell.other && !cell.has_other) break;
      if (reader->kind == Access::read_once) return conflict("reads by load_global_once", *reader, now);
      if (reader->serial != now.stamp.serial) return conflict("read", *reader, now);
      if (reader == &cell.reader && reader->thread / 32 == now.stamp.thread / 32 && reader->epoch == now.stamp.epoch) {
        Stamp each = *reader;  // every lane that read at that moment
        for (uint32_t lane = 0; lane < 32; ++lane) {
          each.thread = static_cast<uint16_t>(reader->thread / 32 * 32 + lane);
          if ((cell.reader_lanes >> lane & 1) && !ordered(each, now)) return conflict("read", each, now);
        }
      } else if (!ordered(*reader, now)) {
        return conflict("read", *reader, now);
      }
    }
  }
  return {};
}

void Shadow::note(Cell& cell, const Now& now) {
  const Stamp& stamp = now.stamp;
  if (writes(stamp.kind)) {
    cell.write = stamp;
    cell.reader_lanes = 0;
    cell.has_other = false;
    cell.in_flight = false;
    return;
  }
  const uint32_t lane = 1u << (stamp.thread % 32);
  const bool none = cell.reader_lanes == 0 || !current(cell.reader, now);
  if (!none) {
    const bool sticky = cell.reader.kind == Access::read_once;  // the strictest kind of reader stays on record
    if (cell.reader.serial != stamp.serial) {
      // Readers of two blocks: whoever writes conflicts with one of them.
      if (!cell.has_other || cell.other.serial == cell.reader.serial) cell.other = stamp;
      cell.has_other = true;
      return;
    }
    if (cell.has_other && cell.other.serial != stamp.serial) {
      if (!sticky && ordered(cell.reader, now)) {
        cell.reader = stamp;
        cell.reader_lanes = lane;
      }
      return;
    }
    if (cell.reader.epoch == stamp.epoch) {
      if (cell.has_other) return;  // two warps of one epoch: whoever writes in it conflicts with one of them
      const bool same_warp = cell.reader.thread / 32 == stamp.thread / 32;
      if (same_warp && cell.reader.clock == stamp.clock) {
        cell.reader_lanes |= lane;
        if (stamp.kind == Access::read_once) cell.reader.kind = stamp.kind;
        return;
      }
      if (!same_warp || !ordered(cell.reader, now)) {
        cell.other = stamp;
        cell.has_other = true;
        return;
      }
    }
    if (sticky) return;
  }
  cell.reader = stamp;
  cell.reader_lanes = lane;
  cell.has_other = false;
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

void Shadow::end_copy(uint64_t address, int bytes, const Now& now) {
  for_cells(address, bytes, [&](Cell& cell) {
    cell.in_flight = false;
    cell.write = now.stamp;
    return std::string();
  });
}

}  // namespace lors::sim
