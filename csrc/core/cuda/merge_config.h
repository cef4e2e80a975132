// SPDX-License-Identifier: Apache-2.0
// The tiling of the merge: a pure function of the problem and the device. A block holds lora_A's columns in shared
// memory and walks down its rows in steps of 32, so the larger the block, the smaller the adapters' share of the traffic: each
// column of blocks reads all of lora_B, and each row of blocks all of lora_A.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

namespace lors::cuda {

constexpr int kMergeStepRows = 32;
constexpr int kMergePanelRows = 256;  // at most
constexpr int kMergeMostRows = 4096;  // more rows spare less than 1 % of the traffic
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
  int panel_rows =
      0;          // of these, how many have lora_B and the index in shared memory at a time: kMergeStepRows times a power of 2
  int chunk = 0;  // ranks held in shared memory at a time: a multiple of 16
  int shared_bytes = 0;
  int tile_at = 0;  // bytes from the start of shared memory, behind the adapters
  int64_t column_blocks = 0;
  int64_t blocks = 0;
};

constexpr int merge_shared_bytes(int columns, int rows, int chunk, int terms_A, int terms_B) {
  return 2 * (terms_A * chunk * (columns + kMergePad) + terms_B * rows * (chunk + kMergePad));
}

// Cost model: bytes moved by the busiest SM, plus 48 KiB latency per block, and half as much again where an SM has only 256
// threads; the constants are guesses.
constexpr double merge_cost(const MergeConfig& c, int64_t N, int64_t r, int value_bytes, int multiprocessors) {
  const double each = static_cast<double>((c.blocks + multiprocessors - 1) / multiprocessors);
  const double rows = static_cast<double>(c.rows < N ? c.rows : N), columns = c.columns;
  const double bytes = 2.0 * value_bytes * rows * columns + 2.0 * static_cast<double>(r) * (rows + columns);
  return each * (bytes + 48 * 1024) * (each * columns < 512 ? 1.5 : 1.0);
}

// terms_*: split terms of an adapter's dtype (operands.cuh). Which ranks are summed together does not depend on the layout, so
// that a compressed weight merges to the dense one's bits: the largest tile decides for all.
constexpr MergeConfig merge_config(int64_t N, int64_t K, int64_t r, int terms_A, int terms_B, Layout layout, int value_bytes,
                                   DeviceLimits limits) {
  const int64_t whole = (r + 15) / 16 * 16;
  const auto make = [&](int columns, int rows, int panel_rows, int64_t chunk) {
    MergeConfig c;
    c.columns = columns;
    c.rows = rows;
    c.panel_rows = panel_rows;
    c.chunk = static_cast<int>(chunk);
    c.tile_at = merge_shared_bytes(columns, panel_rows, c.chunk, terms_A, terms_B);
    c.shared_bytes = c.tile_at + merge_tile_bytes(layout, columns, panel_rows, value_bytes);
    c.column_blocks = (K + columns - 1) / columns;
    c.blocks = c.column_blocks * ((N + rows - 1) / rows);
    return c;
  };
  const auto fits = [&](Layout any, int columns, int rows, int64_t chunk) {
    return merge_shared_bytes(columns, rows, static_cast<int>(chunk), terms_A, terms_B) +
               merge_tile_bytes(any, columns, rows, value_bytes) <=
           limits.shared_bytes;
  };
  // All ranks at once: lora_A stays in shared memory while the block walks down its rows, lora_B comes in by panels.
  MergeConfig best;
  if (whole <= 1024 && fits(Layout::bitmap, 256, kMergeStepRows, whole)) {
    double best_cost = 0;
    for (const int columns : {512, 256}) {
      if (columns == 512 && K <= 256) continue;
      for (int rows = kMergeStepRows; rows <= kMergeMostRows && rows < N + kMergePanelRows; rows += kMergeStepRows) {
        int panel_rows = rows & -rows;  // whole panels, or rows of the next block would be staged
        if (panel_rows > kMergePanelRows) panel_rows = kMergePanelRows;
        if (2 * panel_rows < kMergePanelRows && panel_rows < rows) continue;
        while (panel_rows > kMergeStepRows && !fits(layout, columns, panel_rows, whole)) panel_rows /= 2;
        if (!fits(layout, columns, panel_rows, whole)) continue;
        const MergeConfig c = make(columns, rows, panel_rows, whole);
        const double cost = merge_cost(c, N, r, value_bytes, limits.multiprocessors);
        if (best.columns == 0 || cost < best_cost) best = c, best_cost = cost;
      }
    }
    return best;
  }
  // Ranks in chunks: the adapters come in again for every step of 32 rows.
  for (int chunk = 256; chunk >= 16; chunk -= 16) {
    if (fits(Layout::bitmap, 256, kMergeStepRows, chunk)) return make(256, kMergeStepRows, kMergeStepRows, chunk);
  }
  return best;
}

}  // namespace lors::cuda
