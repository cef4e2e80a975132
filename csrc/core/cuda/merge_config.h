// SPDX-License-Identifier: Apache-2.0
// How the merge is cut into blocks: a pure function of the problem and the device. A block holds its adapters in shared
// memory and walks down its rows in steps of 32, so the larger the block, the smaller the adapters' share of the traffic.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

namespace lors::cuda {

constexpr int kMergeStepRows = 32;
// 16 bytes beyond each row of an operand in shared memory: eight rows that ldmatrix reads then lie in different banks.
constexpr int kMergePad = 8;

struct MergeConfig {
  int columns = 0;  // of the weight, per block; also its number of threads: 256 or 512. 0: nothing fits the device
  int rows = 0;     // of the weight, per block: a multiple of kMergeStepRows
  int chunk = 0;    // ranks held in shared memory at a time: a multiple of 16
  int shared_bytes = 0;
  int64_t column_blocks = 0;
  int64_t blocks = 0;
};

constexpr int merge_shared_bytes(int columns, int rows, int chunk, int planes_A, int planes_B) {
  return 2 * (planes_A * chunk * (columns + kMergePad) + planes_B * rows * (chunk + kMergePad));
}

// planes_*: how many 16-bit planes an adapter's dtype takes (operands.cuh).
constexpr MergeConfig merge_config(int64_t N, int64_t K, int64_t r, int planes_A, int planes_B, DeviceLimits limits) {
  const int64_t whole = (r + 15) / 16 * 16;
  const auto make = [&](int columns, int rows, int64_t chunk) {
    MergeConfig c;
    c.columns = columns;
    c.rows = rows;
    c.chunk = static_cast<int>(chunk);
    c.shared_bytes = merge_shared_bytes(columns, rows, c.chunk, planes_A, planes_B);
    c.column_blocks = (K + columns - 1) / columns;
    c.blocks = c.column_blocks * ((N + rows - 1) / rows);
    return c;
  };
  // All ranks at once, in the largest block that still gives every multiprocessor some 512 threads.
  MergeConfig smallest;
  for (const int columns : {512, 256}) {
    if (columns == 512 && K <= 256) continue;
    for (const int rows : {256, 128, 64, 32}) {
      if (whole > 1024 || merge_shared_bytes(columns, rows, static_cast<int>(whole), planes_A, planes_B) > limits.shared_bytes)
        continue;
      const MergeConfig c = make(columns, rows, whole);
      if (c.blocks * columns * 10 >= int64_t{9} * 512 * limits.multiprocessors) return c;
      smallest = c;
    }
  }
  if (smallest.columns) return smallest;
  // Ranks in chunks: the adapters come in again for every step of 32 rows.
  for (int chunk = 256; chunk >= 16; chunk -= 16) {
    const MergeConfig c = make(256, kMergeStepRows, chunk);
    if (c.shared_bytes <= limits.shared_bytes) return c;
  }
  return {};
}

}  // namespace lors::cuda
