// SPDX-License-Identifier: Apache-2.0
// How many offenders the threads found, and which is the first: sums and minima of integers, the same in any order.
#pragma once

#include <atomic>
#include <cstdint>

namespace lors::cpu {

class Tally {
 public:
  void add(int64_t count, int64_t first) {
    if (count == 0) return;
    count_.fetch_add(count, std::memory_order_relaxed);
    int64_t known = first_.load(std::memory_order_relaxed);
    while (first < known && !first_.compare_exchange_weak(known, first, std::memory_order_relaxed)) {
    }
  }
  int64_t count() const { return count_; }
  int64_t first() const { return first_; }  // INT64_MAX if there is none

 private:
  std::atomic<int64_t> count_{0}, first_{INT64_MAX};
};

}  // namespace lors::cpu
