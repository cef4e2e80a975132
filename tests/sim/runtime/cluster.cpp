// SPDX-License-Identifier: Apache-2.0
#include "cluster.h"

#include <algorithm>
#include <cstring>

#include "device.h"

namespace lors::sim {

namespace {
uint32_t last_serial = 0;
constexpr double kLanding = 0.1;  // probability at each turn of a thread that a bulk copy lands
}  // namespace

Cluster::Cluster(Device& device_, const Launch& launch_) : device(device_), launch(launch_) {
  for (uint32_t rank = 0; rank < launch.cluster; ++rank) blocks_.emplace_back(*this, rank);
}

Cluster::~Cluster() {
  Block::current = nullptr;
  Block::thread = nullptr;
  coordinates = nullptr;
}

uint32_t Cluster::next_serial() { return last_serial + 1; }

void Cluster::run(uint3 index) {
  first_serial = next_serial();
  random = Random(device.random.next());
  failure_.clear();
  ready_.clear();
  in_flight_.clear();
  live_ = launch.cluster * launch.threads();
  arrived_ = phase_ = 0;
  arriving_ = nothing();
  completed_ = nullptr;
  waiting_.clear();
  for (Block& block : blocks_) {
    block.prepare(index, ++last_serial);
    ++index.x;
  }
  schedule();
  for (Block& block : blocks_) block.finish();
}

void Cluster::schedule() {
  const bool by_chance = device.options.copies == Landing::random;
  while (!ready_.empty() || !in_flight_.empty()) {
    if (!in_flight_.empty() && (ready_.empty() || (by_chance && random.chance(kLanding)))) {
      land(random.below(static_cast<uint32_t>(in_flight_.size())));
      continue;
    }
    std::swap(ready_[random.below(static_cast<uint32_t>(ready_.size()))], ready_.back());
    Thread& next = *ready_.back();
    ready_.pop_back();
    Block::current = next.block;
    Block::thread = &next;
    coordinates = &next.coordinates;
    next.fiber.resume();
    Block::thread = nullptr;
    if (!failure_.empty()) throw Error(failure_);
  }
  std::string waiting;
  for (const Block& block : blocks_)
    if (!block.done()) waiting += " [" + std::string(launch.name) + ", " + block.describe_waiting();
  if (!waiting.empty()) throw Error("deadlock: some threads wait for others that never come" + waiting);
}

// ---- the barrier of the cluster ----
void Cluster::arrive(Thread& t, Site site) {
  if (t.in_cluster_barrier) fail(site, "this thread arrives at the barrier of its cluster twice without a wait between");
  t.in_cluster_barrier = true;
  t.cluster_phase = phase_;
  release(t, arriving_);
  ++arrived_;
  complete_if_all_arrived();
}

// A thread that has ended is not waited for.
void Cluster::complete_if_all_arrived() {
  if (arrived_ == 0 || arrived_ < live_) return;
  ++device.launches.back().counters.cluster_barriers;
  completed_ = std::make_shared<const Knowledge>(arriving_);
  ++phase_;
  arrived_ = 0;
  for (Thread* t : waiting_) t->block->wake(*t);
  waiting_.clear();
}

void Cluster::wait(Site site) {
  Thread& me = *Block::thread;
  if (!me.in_cluster_barrier) fail(site, "this thread waits in the barrier of its cluster without having arrived at it");
  while (phase_ == me.cluster_phase) {
    waiting_.push_back(&me);
    me.block->wait("the barrier of the cluster", site);
  }
  me.in_cluster_barrier = false;
  learn(me.known, completed_);
}

void Cluster::thread_ended(Thread&) {
  --live_;
  complete_if_all_arrived();
}

// ---- bulk copies ----
void Cluster::start_copy(const BulkCopy& copy) {
  std::memset(copy.block->shared_backing(copy.to), 0xff, copy.bytes);
  in_flight_.push_back(copy);
  if (device.options.copies == Landing::early) land(in_flight_.size() - 1);
}

void Cluster::land(size_t which) {
  const BulkCopy copy = in_flight_[which];
  in_flight_.erase(in_flight_.begin() + static_cast<std::ptrdiff_t>(which));
  MBarrier& mbarrier = *copy.mbarrier;
  if (mbarrier.phase != copy.phase)
    fail(copy.site, "this bulk copy of " + std::to_string(copy.bytes) +
                        " bytes lands when the phase of its mbarrier is already over: expect_tx announced fewer bytes");
  std::memcpy(copy.block->shared_backing(copy.to), device.memory.backing(copy.from), copy.bytes);
  mbarrier.bytes -= copy.bytes;
  complete_if_due(mbarrier, *copy.block);
}

void complete_if_due(MBarrier& mbarrier, Block& block) {
  if (mbarrier.pending > 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  mbarrier.arriving.learn_clock(block.rank, kMostThreads + mbarrier.index, mbarrier.phase);
  mbarrier.completed = std::make_shared<const Knowledge>(mbarrier.arriving);
  for (Thread* t : mbarrier.waiting) block.wake(*t);
  mbarrier.waiting.clear();
}

}  // namespace lors::sim
