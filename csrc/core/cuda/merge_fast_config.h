// SPDX-License-Identifier: Apache-2.0
// When merge_fast.cuh serves a merge, and the tiling of the fast paths: pure functions of the problem and the device. Blocks
// walk down their rows; their warps lie side by side, so that few blocks read each adapter. The merge's have 256 threads, two
// on a multiprocessor.
#pragma once

#include <lors/merge.h>

#include "merge_config.h"

namespace lors::cuda {

constexpr int kMergeFastThreads = 256;
constexpr int kMergeFastRanks = 64;
// Rows of a block at a time.
constexpr int merge_fast_step(int columns, int threads = kMergeFastThreads) { return 16 * (threads / 32) / (columns / 64); }

// Bytes of a row's codes of so many columns: 2:4 stores half of them, dense all, and a bitmap at most all.
LORS_HOST_DEVICE constexpr int fast_code_bytes(Layout layout, Grid grid, int64_t columns) {
  return static_cast<int>(columns * (grid == Grid::int4 ? 4 : 8) / (layout == Layout::sparse24 ? 16 : 8));
}

// Bytes of a row in shared memory where rows are copied ahead: a bitmap's values, or codes. Beside what a block's columns have
// at most, a bitmap's row has up to 31 bytes before its first value, from where a sector begins, and up to 12 are read from its
// last value on. Each pad makes rows that lanes read at the same time begin in different banks.
LORS_HOST_DEVICE constexpr int fast_row_pitch(Layout layout, Grid grid, int columns) {
  if (grid == Grid::none) return 2 * columns + 80;
  const int pad = layout == Layout::bitmap ? 48 : layout == Layout::dense && grid != Grid::int4 ? 32 : 16;
  return fast_code_bytes(layout, grid, columns) + pad;
}

// Groups of codes that a block's columns have, and their places in a row of shared memory, 16 bytes each: as many, but for
// multiples of 8, which would make neighbouring rows begin in the same bank.
LORS_HOST_DEVICE constexpr int fast_groups(int columns, int64_t group) {
  return group == 32 || group == 64 || group == 128 ? columns / static_cast<int>(group) : 1;
}
LORS_HOST_DEVICE constexpr int fast_group_pitch(int columns, int64_t group) {
  const int groups = fast_groups(columns, group);
  return groups < 8 ? groups : groups + 1;
}

// What the weight of MergeArgs or FusedLinearArgs has in shared memory beside the adapters, in this order: two tables of 16 x 8
// bytes; the index of a panel (merge_config.h); of a bitmap how many values are before each of its words, and where each row
// begins; of a bitmap or codes the rows of two steps; of codes each row's groups and the key of its dither.
constexpr int kMergeFastTables = 2 * 16 * 8;
template <typename Args>
constexpr int fast_tile_bytes(const Args& a, int columns, int panel_rows, int threads) {
  const Quantization& q = a.quantization;
  const bool bitmap = a.weight_layout == Layout::bitmap, codes = q.grid != Grid::none;
  if (a.weight_layout == Layout::dense && a.mask == nullptr) return 0;
  const int index = 4 * panel_rows * merge_tile_pitch(columns);
  int bytes = kMergeFastTables + index;
  if (bitmap) bytes += index + 8 * panel_rows;
  if (bitmap || codes) bytes += 2 * merge_fast_step(columns, threads) * fast_row_pitch(a.weight_layout, q.grid, columns);
  if (codes) bytes += (16 * fast_group_pitch(columns, q.group) + 8) * panel_rows;
  return bytes;
}

// What the tiling of a fast path depends on beside the weight: `threads` and `blocks` per multiprocessor; the bytes that a
// block moves for each of its weights, rows and columns; and its shared memory behind that of the weight and the adapters, in
// all, for each row of a panel, and the least that a block has.
struct FastBlocks {
  int threads = kMergeFastThreads, per_multiprocessor = 2;
  double weight_bytes = 0, row_bytes = 0, column_bytes = 0;
  int shared = 0, panel_row_shared = 0, least_shared = 0;
};

// 16-bit results, and weights of their dtype or quantised, in rows of whole 16 bytes; any adapters of up to 64 ranks.
template <typename Args>
bool fast_path_takes(const Args& a, DType result) {
  const Grid grid = a.quantization.grid;
  if (dtype_size(result) != 2 || a.r == 0 || a.r > kMergeFastRanks || a.in_features % 8 != 0 ||
      reinterpret_cast<uintptr_t>(a.weight) % 16 != 0)
    return false;
  if (grid == Grid::none) return a.weight_dtype == result;
  return a.weight_layout == Layout::bitmap || fast_code_bytes(a.weight_layout, grid, a.in_features) % 16 == 0;
}

// Of MergeArgs or FusedLinearArgs with a weight and an adapter; columns = 0 where nothing fits.
template <typename Args>
MergeConfig fast_path_config(const Args& a, int terms_A, int terms_B, const FastBlocks& of, DeviceLimits limits) {
  MergeConfig best;
  const int64_t N = a.out_features, K = a.in_features;
  const int chunk = static_cast<int>((a.r + 15) / 16 * 16), slots = of.per_multiprocessor * limits.multiprocessors;
  double best_cost = 0;
  for (const int columns : {512, 256}) {
    if (columns == 512 && K <= 256) continue;
    const int step = merge_fast_step(columns, of.threads);
    const int64_t column_blocks = (K + columns - 1) / columns;
    for (int64_t target = step; target <= kMergeMostRows && target < N + step; target += step) {
      // As few panels as shared memory allows, all of one size.
      for (int panels = static_cast<int>((target + kMergePanelRows - 1) / kMergePanelRows);; ++panels) {
        MergeConfig c;
        c.columns = columns;
        c.panel_rows = static_cast<int>((target + panels * step - 1) / (panels * step) * step);
        c.rows = c.panel_rows * panels;
        c.chunk = chunk;
        c.tile_at = merge_shared_bytes(columns, c.panel_rows, chunk, terms_A, terms_B);
        c.shared_bytes =
            c.tile_at + fast_tile_bytes(a, columns, c.panel_rows, of.threads) + of.shared + of.panel_row_shared * c.panel_rows;
        if (c.shared_bytes < of.least_shared) c.shared_bytes = of.least_shared;
        // The system takes 1 KiB for each block beyond the first.
        if (c.shared_bytes > (limits.shared_bytes - 1024 * (of.per_multiprocessor - 1)) / of.per_multiprocessor) {
          if (c.panel_rows == step) break;
          continue;
        }
        c.column_blocks = column_blocks;
        c.blocks = column_blocks * ((N + c.rows - 1) / c.rows);
        const double rows = static_cast<double>(c.rows < N ? c.rows : N);
        const double bytes = of.weight_bytes * rows * columns + of.row_bytes * rows + of.column_bytes * columns + 48 * 1024;
        const double cost = static_cast<double>((c.blocks + slots - 1) / slots) * bytes;
        if (best.columns == 0 || cost < best_cost) best = c, best_cost = cost;
        break;
      }
    }
    // A bitmap's rows share a sector with the next block at each end, and so do scales: the wider, the fewer.
    if (best.columns && (a.weight_layout == Layout::bitmap || a.quantization.grid != Grid::none)) break;
  }
  return best;
}

// columns = 0: the general kernel serves. It adds the same products in the same order, so the bits do not depend on this. The
// fast path draws no random numbers.
inline MergeConfig merge_fast_config(const MergeArgs& a, int terms_A, int terms_B, DeviceLimits limits) {
  if (!fast_path_takes(a, a.merged_dtype) || reinterpret_cast<uintptr_t>(a.merged) % 16 != 0 || a.draws.rounds || a.draws.noise)
    return {};
  const double r = static_cast<double>(a.r);
  return fast_path_config(a, terms_A, terms_B, {.weight_bytes = 4, .row_bytes = 2 * r, .column_bytes = 2 * r}, limits);
}

// Queues the kernel (merge_fast.cu) for such a tiling.
struct MergeProblem;
Status merge_fast(const MergeArgs& args, const MergeProblem& problem, const MergeConfig& config, const CudaHost& host);

}  // namespace lors::cuda
