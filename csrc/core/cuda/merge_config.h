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

// What a compressed weight takes beside the adapters. Per row of a block: a word for each 32 columns, of bits and, for a
// bitmap, of values before them, and where the row begins; the pads keep eight rows that a warp reads at once in different
// banks. And for a bitmap the values of 16 rows x 64 columns per warp.
constexpr int kMergeValuesPitch = 66;
constexpr int merge_tile_pitch(int columns) { return columns / 32 + 4; }
constexpr int merge_tile_bytes(Layout layout, int columns, int rows, int value_bytes) {
  const int index = 4 * rows * merge_tile_pitch(columns), warps = columns / 32;
  if (layout == Layout::dense) return 0;
  return layout == Layout::sparse24 ? index : 2 * index + 8 * rows + warps * 16 * kMergeValuesPitch * value_bytes;
}

struct MergeConfig {
  int columns = 0;  // of the weight, per block; also its number of threads: 256 or 512. 0: nothing fits the device
  int rows = 0;     // of the weight, per block: a multiple of kMergeStepRows
  int chunk = 0;    // ranks held in shared memory at a time: a multiple of 16
  int shared_bytes = 0;
  int tile_at = 0;  // bytes from the start of shared memory, behind the adapters
  int64_t column_blocks = 0;
  int64_t blocks = 0;
};

constexpr int merge_shared_bytes(int columns, int rows, int chunk, int planes_A, int planes_B) {
  return 2 * (planes_A * chunk * (columns + kMergePad) + planes_B * rows * (chunk + kMergePad));
}

// planes_*: how many 16-bit planes an adapter's dtype takes (operands.cuh). Which ranks are added up together does not depend
// on the layout, so that a compressed weight merges to the dense one's bits: room for the largest tile decides it for all.
constexpr MergeConfig merge_config(int64_t N, int64_t K, int64_t r, int planes_A, int planes_B, Layout layout, int value_bytes,
                                   DeviceLimits limits) {
  const int64_t whole = (r + 15) / 16 * 16;
  const auto make = [&](int columns, int rows, int64_t chunk) {
    MergeConfig c;
    c.columns = columns;
    c.rows = rows;
    c.chunk = static_cast<int>(chunk);
    c.tile_at = merge_shared_bytes(columns, rows, c.chunk, planes_A, planes_B);
    c.shared_bytes = c.tile_at + merge_tile_bytes(layout, columns, rows, value_bytes);
    c.column_blocks = (K + columns - 1) / columns;
    c.blocks = c.column_blocks * ((N + rows - 1) / rows);
    return c;
  };
  const auto fits = [&](Layout any, int columns, int rows, int64_t chunk) {
    return merge_shared_bytes(columns, rows, static_cast<int>(chunk), planes_A, planes_B) +
               merge_tile_bytes(any, columns, rows, value_bytes) <=
           limits.shared_bytes;
  };
  // All ranks at once, in the largest block that still gives every multiprocessor some 512 threads.
  const bool resident = whole <= 1024 && fits(Layout::bitmap, 256, kMergeStepRows, whole);
  MergeConfig smallest;
  for (const int columns : {512, 256}) {
    if (columns == 512 && K <= 256) continue;
    for (const int rows : {256, 128, 64, 32}) {
      if (!resident || !fits(layout, columns, rows, whole)) continue;
      const MergeConfig c = make(columns, rows, whole);
      if (c.blocks * columns * 10 >= int64_t{9} * 512 * limits.multiprocessors) return c;
      smallest = c;
    }
  }
  if (smallest.columns) return smallest;
  // Ranks in chunks: the adapters come in again for every step of 32 rows.
  for (int chunk = 256; chunk >= 16; chunk -= 16) {
    if (fits(Layout::bitmap, 256, kMergeStepRows, chunk)) return make(256, kMergeStepRows, chunk);
  }
  return {};
}

}  // namespace lors::cuda
