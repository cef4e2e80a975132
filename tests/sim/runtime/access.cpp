// SPDX-License-Identifier: Apache-2.0
// Every access of a kernel to memory: checked, counted, shown to the race detector, then done.
#include <cstring>

#include "block.h"
#include "device.h"

namespace lors::sim {

namespace {

// 32-bit shared addresses begin here, not at 0, so that an offset used as an address is detected.
constexpr uint32_t kSharedBase = 1024;

struct Here {
  Block& block;
  Thread& thread;
  Device& device;
};

Here begin(Site site) {
  Block& block = *Block::current;
  block.pause_sometimes();
  Block::thread->site = site;
  return {block, *Block::thread, block.device};
}

Now now(const Here& here, Access kind, bool shared, Site site) {
  Now n;
  n.stamp.serial = here.block.serial;
  n.stamp.epoch = here.block.epoch;
  n.stamp.clock = here.thread.seen[static_cast<size_t>(here.thread.lane)];
  n.stamp.thread = static_cast<uint16_t>(here.thread.index);
  n.stamp.kind = kind;
  n.stamp.site = site;
  n.valid_from = shared ? here.block.serial : here.device.first_serial;
  n.seen = here.thread.seen.data();
  return n;
}

void require_aligned(uint64_t address, int bytes, const char* what, Site site) {
  if (address % static_cast<uint64_t>(bytes) != 0)
    fail(site, std::string(what) + " of " + std::to_string(bytes) + " bytes, misaligned: the address is a multiple of " +
                   std::to_string(address & (~address + 1)) + " only");
}

// Checks an access to global memory and returns its bytes.
uint8_t* global(const Here& here, uint64_t address, int bytes, Access kind, const char* what, int* buffer, Site site) {
  std::string problem;
  *buffer = here.device.memory.find(address, bytes, &problem);
  if (*buffer < 0) fail(site, std::string(what) + " of " + std::to_string(bytes) + " bytes: " + problem);
  if (here.device.options.race) {
    problem = here.device.global_shadow.access(address, bytes, now(here, kind, false, site), false);
    if (!problem.empty()) fail(site, problem + " ('" + here.device.memory.buffers()[static_cast<size_t>(*buffer)].name + "')");
  }
  return here.device.memory.backing(address);
}

uint32_t shared_offset(const Here& here, uint64_t address, int bytes, const char* what, Site site) {
  const uint64_t offset = address - here.block.shared_begin();
  if (!here.block.is_shared(address)) fail(site, std::string(what) + ": the address is not shared memory");
  if (offset + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(here.block.launch.shared_bytes))
    fail(site, std::string(what) + " out of bounds: bytes [" + std::to_string(offset) + ", " +
                   std::to_string(offset + static_cast<uint64_t>(bytes)) + ") of " +
                   std::to_string(here.block.launch.shared_bytes) + " of shared memory");
  require_aligned(offset, bytes, what, site);
  return static_cast<uint32_t>(offset);
}

// The generic address of a 32-bit one.
uint64_t generic(const Here& here, uint32_t address) {
  return here.block.shared_begin() + static_cast<uint64_t>(int64_t{address} - kSharedBase);
}

uint8_t* shared(const Here& here, uint32_t offset, int bytes, Access kind, Site site) {
  if (here.device.options.race) {
    const bool needs_value = kind != Access::write;
    const std::string problem = here.device.shared_shadow.access(offset, bytes, now(here, kind, true, site), needs_value);
    if (!problem.empty()) fail(site, problem + " (byte " + std::to_string(offset) + " of shared memory)");
  }
  return here.block.shared_backing(offset);
}

void count(const Here& here, Space space, Site site, uint64_t address, int width, int moved, int buffer) {
  if (here.thread.warp->log) here.thread.warp->log->add(space, site, here.thread.lane, address, width, moved, buffer);
}

// A poisoned destination, or the copy itself.
void land(const Here& here, AsyncCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  uint8_t* to = here.block.shared_backing(copy.to);
  std::memset(to, 0, 16);
  if (copy.from_bytes > 0) std::memcpy(to, here.device.memory.backing(copy.from), static_cast<size_t>(copy.from_bytes));
}

uint64_t address_of(const void* p) { return reinterpret_cast<uint64_t>(p); }

}  // namespace

void load_global(void* value, const void* from, int bytes, bool once, Site site) {
  const Here here = begin(site);
  int buffer = -1;
  const uint8_t* p =
      global(here, address_of(from), bytes, once ? Access::read_once : Access::read, "global read", &buffer, site);
  require_aligned(address_of(from), bytes, "global read", site);
  count(here, Space::global_load, site, address_of(from), bytes, bytes, buffer);
  std::memcpy(value, p, static_cast<size_t>(bytes));
}

void store_global(void* to, const void* value, int bytes, Site site) {
  const Here here = begin(site);
  int buffer = -1;
  uint8_t* p = global(here, address_of(to), bytes, Access::write, "global write", &buffer, site);
  require_aligned(address_of(to), bytes, "global write", site);
  count(here, Space::global_store, site, address_of(to), bytes, bytes, buffer);
  std::memcpy(p, value, static_cast<size_t>(bytes));
}

void load_shared(void* value, const void* from, int bytes, Site site) {
  const Here here = begin(site);
  const uint32_t offset = shared_offset(here, address_of(from), bytes, "shared read", site);
  count(here, Space::shared_load, site, offset, bytes, bytes, -1);
  std::memcpy(value, shared(here, offset, bytes, Access::read, site), static_cast<size_t>(bytes));
}

void store_shared(void* to, const void* value, int bytes, Site site) {
  const Here here = begin(site);
  const uint32_t offset = shared_offset(here, address_of(to), bytes, "shared write", site);
  count(here, Space::shared_store, site, offset, bytes, bytes, -1);
  std::memcpy(shared(here, offset, bytes, Access::write, site), value, static_cast<size_t>(bytes));
}

void read_shared_row(void* row, uint32_t address, Site site) {
  const Here here = begin(site);
  const uint32_t offset = shared_offset(here, generic(here, address), 16, "ldmatrix", site);
  std::memcpy(row, shared(here, offset, 16, Access::read, site), 16);
}

void atomic(void* at, void* before, int bytes, Combine combine, const void* operand, Site site) {
  const Here here = begin(site);
  uint8_t* p = nullptr;
  int buffer = -1;
  if (here.block.is_shared(address_of(at))) {
    p = shared(here, shared_offset(here, address_of(at), bytes, "shared atomic", site), bytes, Access::atomic, site);
  } else {
    p = global(here, address_of(at), bytes, Access::atomic, "global atomic", &buffer, site);
    require_aligned(address_of(at), bytes, "global atomic", site);
    count(here, Space::global_store, site, address_of(at), bytes, bytes, buffer);
  }
  std::memcpy(before, p, static_cast<size_t>(bytes));
  combine(before, p, operand);
  ++here.device.launches.back().counters.atomics;
}

uint8_t* dynamic_shared() { return reinterpret_cast<uint8_t*>(Block::current->shared_begin()); }

uint32_t shared_address(const void* p, Site site) {
  if (!Block::current->is_shared(address_of(p))) fail(site, "shared_address of a pointer that is not to shared memory");
  return kSharedBase + static_cast<uint32_t>(address_of(p) - Block::current->shared_begin());
}

void copy_async(uint32_t to, const void* from, int from_bytes, Site site) {
  const Here here = begin(site);
  if (from_bytes < 0 || from_bytes > 16) fail(site, "cp.async of " + std::to_string(from_bytes) + " bytes: 0 to 16, please");
  const uint32_t offset = shared_offset(here, generic(here, to), 16, "cp.async to shared memory", site);
  require_aligned(address_of(from), 16, "cp.async", site);
  if (from_bytes > 0) {
    int buffer = -1;
    global(here, address_of(from), from_bytes, Access::read, "cp.async", &buffer, site);
    count(here, Space::copy_source, site, address_of(from), 16, from_bytes, buffer);
  }
  count(here, Space::copy_target, site, offset, 16, 16, -1);
  if (here.device.options.race) {
    const std::string problem = here.device.shared_shadow.begin_copy(offset, 16, now(here, Access::write, true, site));
    if (!problem.empty()) fail(site, problem + " (cp.async to byte " + std::to_string(offset) + " of shared memory)");
  }
  AsyncCopy copy;
  copy.to = offset;
  copy.from = address_of(from);
  copy.from_bytes = from_bytes;
  copy.site = site;
  const Landing when = here.device.options.copies;
  if (when == Landing::early || (when == Landing::random && here.block.random.chance(0.5)))
    land(here, copy);
  else
    std::memset(here.block.shared_backing(offset), 0xff, 16);
  here.thread.uncommitted.push_back(copy);
}

void commit_copies() {
  Thread& me = *Block::thread;
  me.groups.push_back(std::move(me.uncommitted));
  me.uncommitted.clear();
}

void wait_for_copies(int pending) {
  const Here here{*Block::current, *Block::thread, Block::current->device};
  while (here.thread.groups.size() > static_cast<size_t>(pending)) {
    for (AsyncCopy& copy : here.thread.groups.front()) {
      land(here, copy);
      if (here.device.options.race) here.device.shared_shadow.end_copy(copy.to, 16, now(here, Access::write, true, copy.site));
    }
    here.thread.groups.pop_front();
  }
}

}  // namespace lors::sim
