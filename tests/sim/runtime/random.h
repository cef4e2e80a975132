// SPDX-License-Identifier: Apache-2.0
// xorshift64*: fast, and the same on every machine.
#pragma once

#include <cstdint>

namespace lors::sim {

class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_((seed + 1) * 0x9e3779b97f4a7c15ull) {
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 4; ++i) next();
  }
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1dull) >> 32);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(uint64_t{next()} * bound >> 32); }
  bool chance(double probability) { return next() < probability * 4294967296.0; }

 private:
  uint64_t state_;
};

}  // namespace lors::sim
