// SPDX-License-Identifier: Apache-2.0
// Every access of a kernel to memory: checked, counted, shown to the race detector, then done.
#include <algorithm>
#include <cstring>

#include "cluster.h"
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
  n.valid_from = shared ? here.block.cluster.first_serial : here.device.first_serial;
  n.seen = here.thread.seen.data();
  n.known = here.thread.known.get();
  n.first_serial = here.block.cluster.first_serial;
  n.any_order = here.block.launch.cluster > 1 || !here.block.mbarriers.empty();
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

uint32_t shared_offset(const Here& here, uint64_t address, int bytes, const char* what, Site site, int alignment = 0) {
  const uint64_t offset = address - here.block.shared_begin();
  if (!here.block.is_shared(address)) fail(site, std::string(what) + ": the address is not shared memory");
  if (offset + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(here.block.launch.shared_bytes))
    fail(site, std::string(what) + " out of bounds: bytes [" + std::to_string(offset) + ", " +
                   std::to_string(offset + static_cast<uint64_t>(bytes)) + ") of " +
                   std::to_string(here.block.launch.shared_bytes) + " of shared memory");
  require_aligned(offset, alignment > 0 ? alignment : bytes, what, site);
  return static_cast<uint32_t>(offset);
}

// What is not an operation of an mbarrier may not touch one.
void require_no_mbarrier(const Block& block, uint32_t offset, int bytes, Site site) {
  for (const MBarrier& mbarrier : block.mbarriers)
    if (offset < mbarrier.offset + 8 && mbarrier.offset < offset + static_cast<uint32_t>(bytes))
      fail(site,
           "an ordinary access to byte " + std::to_string(mbarrier.offset) + " of shared memory, which holds an mbarrier");
}

// A shared::cluster address, as mapa gives it: the block's rank + 1 in the top byte. 0 there: the block's own.
constexpr int kRankShift = 24;

// The generic address of a 32-bit one.
uint64_t generic(const Here& here, uint32_t address) {
  return here.block.shared_begin() + static_cast<uint64_t>(int64_t{address} - kSharedBase);
}

uint8_t* shared(const Here& here, Block& owner, uint32_t offset, int bytes, Access kind, Site site) {
  require_no_mbarrier(owner, offset, bytes, site);
  if (here.device.options.race) {
    const bool needs_value = kind != Access::write;
    const std::string problem =
        here.device.shared_shadow.access(owner.shadow_address(offset), bytes, now(here, kind, true, site), needs_value);
    if (!problem.empty()) fail(site, problem + " (byte " + std::to_string(offset) + " of shared memory)");
  }
  return owner.shared_backing(offset);
}
uint8_t* shared(const Here& here, uint32_t offset, int bytes, Access kind, Site site) {
  return shared(here, here.block, offset, bytes, kind, site);
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
  require_no_mbarrier(here.block, offset, 16, site);
  if (here.device.options.race) {
    const std::string problem =
        here.device.shared_shadow.begin_copy(here.block.shadow_address(offset), 16, now(here, Access::write, true, site));
    if (!problem.empty()) fail(site, problem + " (cp.async to byte " + std::to_string(offset) + " of shared memory)");
  }
  AsyncCopy copy;
  copy.to = offset;
  copy.from = address_of(from);
  copy.from_bytes = from_bytes;
  copy.site = site;
  const Landing when = here.device.options.copies;
  if (when == Landing::early || (when == Landing::random && here.block.cluster.random.chance(0.5)))
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
      if (here.device.options.race)
        here.device.shared_shadow.end_copy(here.block.shadow_address(copy.to), 16, now(here, Access::write, true, copy.site));
    }
    here.thread.groups.pop_front();
  }
}

// ---- the shared memory of a cluster ----
uint32_t map_shared(uint32_t address, uint32_t rank, Site site) {
  const Block& block = *Block::current;
  if (address >> kRankShift != 0) fail(site, "mapa of an address that is not the block's own shared memory");
  if (rank >= block.launch.cluster)
    fail(site, "mapa to block " + std::to_string(rank) + " of a cluster of " + std::to_string(block.launch.cluster));
  return address | (rank + 1) << kRankShift;
}

namespace {
uint8_t* distributed(const Here& here, uint32_t address, int bytes, Access kind, const char* what, Site site) {
  Cluster& cluster = here.block.cluster;
  const uint32_t tag = address >> kRankShift;
  if (tag > here.block.launch.cluster) fail(site, std::string(what) + ": the address is not shared memory of the cluster");
  Block& owner = tag == 0 ? here.block : cluster.block(tag - 1);
  const uint64_t own = generic(here, address & ((1u << kRankShift) - 1));
  const uint32_t offset = shared_offset(here, own, bytes, what, site);
  Counters& counters = here.device.launches.back().counters;
  (kind == Access::write ? counters.cluster_bytes_written : counters.cluster_bytes_read) += static_cast<uint64_t>(bytes);
  if (&owner != &here.block) {
    const std::string of =
        std::string(what) + " of the shared memory of block " + std::to_string(owner.rank) + " of the cluster, ";
    if (owner.done()) fail(site, of + "which has ended");
    if (here.thread.known == nullptr || !here.thread.known->has_started(owner.rank))
      fail(site, of + "of which nothing says that it has started: both have to pass a barrier of the cluster first");
    owner.visitors[here.block.rank * kMostThreads + static_cast<uint32_t>(here.thread.index)] =
        now(here, kind, true, site).stamp;
  }
  return shared(here, owner, offset, bytes, kind, site);
}
}  // namespace

void load_cluster(void* value, uint32_t address, int bytes, Site site) {
  const Here here = begin(site);
  const uint8_t* p = distributed(here, address, bytes, Access::read, "read", site);
  std::memcpy(value, p, static_cast<size_t>(bytes));
}

void store_cluster(uint32_t address, const void* value, int bytes, Site site) {
  const Here here = begin(site);
  uint8_t* p = distributed(here, address, bytes, Access::write, "write", site);
  std::memcpy(p, value, static_cast<size_t>(bytes));
}

// ---- mbarriers ----
namespace {
MBarrier& mbarrier_at(const Here& here, uint32_t address, const char* what, Site site) {
  const uint32_t offset = shared_offset(here, generic(here, address), 8, what, site);
  for (MBarrier& mbarrier : here.block.mbarriers) {
    if (mbarrier.offset != offset) continue;
    if (here.device.options.race) {  // as a reader: the initialisation has to come first
      const std::string problem =
          here.device.shared_shadow.access(here.block.shadow_address(offset), 8, now(here, Access::read, true, site), true);
      if (!problem.empty()) fail(site, problem + " (the mbarrier at byte " + std::to_string(offset) + " of shared memory)");
    }
    return mbarrier;
  }
  fail(site,
       std::string(what) + ": byte " + std::to_string(offset) + " of shared memory holds no mbarrier that is initialised");
}

void expect(MBarrier& mbarrier, uint32_t bytes, Site site) {
  mbarrier.bytes += bytes;
  if (mbarrier.bytes >= 1 << 20) fail(site, "expect_tx: an mbarrier counts up to 2^20 - 1 bytes");
}
}  // namespace

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  const Here here = begin(site);
  const uint32_t offset = shared_offset(here, generic(here, address), 8, "mbarrier.init", site);
  if (count < 1 || count >= 1 << 20) fail(site, "mbarrier.init with a count that is not 1 to 2^20 - 1");
  if (here.block.mbarriers.size() == kMostMBarriers) fail(site, "more mbarriers in a block than the simulator has");
  shared(here, offset, 8, Access::write, site);  // and fails where there is one already
  MBarrier& fresh = here.block.mbarriers.emplace_back();
  fresh.offset = offset;
  fresh.index = static_cast<uint32_t>(here.block.mbarriers.size()) - 1;
  fresh.count = fresh.pending = count;
  fresh.owner = here.thread.index;
  fresh.arriving = here.block.cluster.nothing();
}

void fence_mbarrier_init() {
  for (MBarrier& mbarrier : Block::current->mbarriers)
    if (mbarrier.owner == Block::thread->index) mbarrier.fenced = true;
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site) {
  const Here here = begin(site);
  MBarrier& mbarrier = mbarrier_at(here, address, "mbarrier.arrive", site);
  expect(mbarrier, expected_bytes, site);
  if (mbarrier.pending == 0)
    fail(site, "one more arrival at an mbarrier than its count, " + std::to_string(mbarrier.count) + ", in one phase");
  --mbarrier.pending;
  release(here.thread, mbarrier.arriving);
  complete_if_due(mbarrier, here.block);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  const Here here = begin(site);
  if (parity > 1) fail(site, "mbarrier.try_wait.parity takes 0 or 1");
  MBarrier& mbarrier = mbarrier_at(here, address, "mbarrier.try_wait", site);
  while ((mbarrier.phase & 1) == parity) {
    here.thread.waits_for = &mbarrier;
    mbarrier.waiting.push_back(&here.thread);
    here.block.wait("an mbarrier", site);
  }
  mbarrier.waited = std::max(mbarrier.waited, mbarrier.phase);
  learn(here.thread.known, mbarrier.completed);
}

void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t address, Site site) {
  const Here here = begin(site);
  const int size = static_cast<int>(bytes);
  if (bytes == 0 || bytes % 16 != 0 || bytes >= 1 << 20)
    fail(site, "a bulk copy of " + std::to_string(bytes) + " bytes: a multiple of 16 below 2^20, please");
  const uint32_t offset = shared_offset(here, generic(here, to), size, "a bulk copy to shared memory", site, 16);
  require_aligned(address_of(from), 16, "a bulk copy in units", site);
  require_no_mbarrier(here.block, offset, size, site);
  std::string problem;
  const int buffer = here.device.memory.find(address_of(from), size, &problem);
  if (buffer < 0) fail(site, "a bulk copy of " + std::to_string(bytes) + " bytes: " + problem);
  MBarrier& mbarrier = mbarrier_at(here, address, "a bulk copy", site);
  if (!mbarrier.fenced) fail(site, "a bulk copy may not see its mbarrier: its initialisation needs fence_mbarrier_init");
  if (here.device.options.race) {
    Stamp copy = now(here, Access::read, true, site).stamp;
    copy.epoch = kNoEpoch;
    copy.clock = mbarrier.phase + 1;
    copy.thread = static_cast<uint16_t>(kMostThreads + mbarrier.index);
    problem = here.device.global_shadow.bulk_copy(address_of(from), size, now(here, Access::read, false, site), copy);
    copy.kind = Access::write;
    if (problem.empty())
      problem = here.device.shared_shadow.bulk_copy(here.block.shadow_address(offset), size,
                                                    now(here, Access::write, true, site), copy);
    if (!problem.empty()) fail(site, problem);
  }
  here.device.launches.back().add_bulk_copy(address_of(from), bytes, buffer);
  mbarrier.copied = mbarrier.phase + 1;
  mbarrier.copy_site = site;
  here.block.cluster.start_copy({&here.block, &mbarrier, offset, address_of(from), bytes, mbarrier.phase, site});
}

}  // namespace lors::sim
