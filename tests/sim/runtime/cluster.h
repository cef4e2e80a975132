// SPDX-License-Identifier: Apache-2.0
// The blocks that run together: those of a cluster, or one by itself. The scheduler runs one of their threads at a time, in
// random order, until it has to wait, and lets bulk copies land in between.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "block.h"

namespace lors::sim {

// cp.async.bulk from global to a block's shared memory.
struct BulkCopy {
  Block* block = nullptr;
  MBarrier* mbarrier = nullptr;
  uint32_t to = 0;  // offset in shared memory
  uint64_t from = 0;
  uint32_t bytes = 0;
  uint32_t phase = 0;  // of the mbarrier at the issue
  Site site;
};

class Cluster {
 public:
  Cluster(Device& device, const Launch& launch);
  ~Cluster();
  // Runs the blocks from start to end; `index`: of the first one.
  void run(uint3 index);

  // Called by threads.
  void arrive(Thread& t, Site site);
  void wait(Site site);
  void start_copy(const BulkCopy& copy);

  // Called by blocks.
  void thread_ended(Thread& t);
  void make_ready(Thread& t) { ready_.push_back(&t); }
  void fail_run(const std::string& failure) { failure_ = failure; }

  Block& block(uint32_t rank) { return blocks_[rank]; }
  Knowledge nothing() const { return Knowledge(launch.cluster, launch.threads()); }

  Device& device;
  const Launch& launch;
  Random random;
  uint32_t first_serial = 0;

  static uint32_t next_serial();  // of the next block to run

 private:
  void schedule();
  void complete_if_all_arrived();
  void land(size_t copy);

  std::deque<Block> blocks_;
  std::vector<Thread*> ready_;
  std::string failure_;
  std::vector<BulkCopy> in_flight_;

  // The barrier of the cluster.
  uint32_t live_ = 0, arrived_ = 0, phase_ = 0;
  Knowledge arriving_;
  Known completed_;
  std::vector<Thread*> waiting_;
};

// A phase that is complete: the next one begins, and the waiting threads run on.
void complete_if_due(MBarrier& mbarrier, Block& block);

}  // namespace lors::sim
