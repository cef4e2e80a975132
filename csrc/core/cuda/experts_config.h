// SPDX-License-Identifier: Apache-2.0
// How many tiles of rows a launch has whose rows belong to experts, without knowing how many rows each has.
#pragma once

#include <cstdint>

namespace lors::cuda {

// The most tiles of up to `tile` rows that `groups` of `rows` in all can have: each that has a row begins one.
constexpr int64_t most_tiles(int64_t rows, int64_t groups, int64_t tile) {
  const int64_t begun = groups < rows ? groups : rows;
  return begun + (rows - begun) / tile;
}

}  // namespace lors::cuda
