// SPDX-License-Identifier: Apache-2.0
// Vector clocks: what a thread knows to have happened in its cluster. Barriers of a block and __syncwarp are kept more cheaply
// (Block::epoch, Thread::seen); this holds what came through mbarriers and barriers of the cluster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace lors::sim {

constexpr uint32_t kMostThreads = 1024;  // of a block. From here on "threads" are the bulk copies of an mbarrier each.
constexpr uint32_t kMostMBarriers = 64;  // of a block
constexpr uint32_t kNoEpoch = ~0u;       // of a bulk copy, which no barrier of the block orders

class Knowledge {
 public:
  Knowledge() = default;
  Knowledge(uint32_t blocks, uint32_t threads) : threads_(threads), epochs_(blocks), clocks_(blocks * pitch()) {}

  // Whether the access of `thread` of block `rank` at this epoch and clock is known.
  bool covers(uint32_t rank, uint32_t thread, uint32_t epoch, uint32_t clock) const {
    return rank < epochs_.size() && (epoch < epochs_[rank] || clock <= clocks_[index(rank, thread)]);
  }
  bool has_started(uint32_t rank) const { return epochs_[rank] > 0; }

  void learn_epoch(uint32_t rank, uint32_t epoch) { epochs_[rank] = std::max(epochs_[rank], epoch); }
  void learn_clock(uint32_t rank, uint32_t thread, uint32_t clock) {
    uint32_t& known = clocks_[index(rank, thread)];
    known = std::max(known, clock);
  }
  void join(const Knowledge& other) {
    for (size_t i = 0; i < epochs_.size(); ++i) epochs_[i] = std::max(epochs_[i], other.epochs_[i]);
    for (size_t i = 0; i < clocks_.size(); ++i) clocks_[i] = std::max(clocks_[i], other.clocks_[i]);
  }

 private:
  size_t pitch() const { return threads_ + kMostMBarriers; }
  size_t index(uint32_t rank, uint32_t thread) const {
    return rank * pitch() + (thread < kMostThreads ? thread : threads_ + thread - kMostThreads);
  }

  uint32_t threads_ = 0;          // of a block
  std::vector<uint32_t> epochs_;  // by block: all before this epoch is known
  std::vector<uint32_t> clocks_;  // by thread and mbarrier of each block: all up to this clock is known
};

// Never changed once it is shared; null: nothing.
using Known = std::shared_ptr<const Knowledge>;

inline void learn(Known& known, const Known& more) {
  if (more == nullptr || known == more) return;
  if (known == nullptr) {
    known = more;
    return;
  }
  auto both = std::make_shared<Knowledge>(*known);
  both->join(*more);
  known = std::move(both);
}

}  // namespace lors::sim
