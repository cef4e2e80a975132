// SPDX-License-Identifier: Apache-2.0
// The tiling of fused_linear, a pure function of the problem and the device. A block computes a tile of tokens x `columns` of
// the output over one part (split) of the reduction, `depth_step` at a time. Small blocks read the activation and the other
// adapter more often; large ones need more splits to fill the device.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

#include "experts_config.h"

namespace lors::cuda {

constexpr int kFusedWarpColumns = 64, kFusedWarpDepth = 32;  // of W~, per warp and step
constexpr int kFusedWideTokens = 256;                        // the token tile whose warps share W~ through shared memory
constexpr int kFusedPad = 8;  // elements after each row of an adapter, against bank conflicts of ldmatrix
constexpr int kFusedMaxStages = 4;

constexpr bool fused_wide(int token_tile) { return token_tile == kFusedWideTokens; }

struct FusedShape {
  int64_t tokens = 0;
  int64_t groups = 1;   // of tokens, each in tiles of its own: experts, and the rows that have none
  int64_t columns = 0;  // of the output: out_features, or in_features for the input gradient
  int64_t depth = 0;    // of the reduction: the other one
  int64_t r = 0;
  bool input_gradient = false;
  DType activation = DType::float32, weight = DType::float32;
  DType own = DType::float32;    // adapter along `columns`: lora_B, or lora_A for the input gradient
  DType other = DType::float32;  // adapter along `depth`
};

struct FusedConfig {
  int token_tile = 0;  // 16, 64 or 256; 16 for float32 activations. 0: nothing fits the device
  int column_warps = 0, depth_warps = 0;
  int columns = 0, depth_step = 0;  // 64 and 32 times that; the step is a power of two
  int depth_log2 = 0;
  int threads = 0;
  int ranks = 0, rank_chunks = 0;  // ranks of `other` in shared memory at a time, and how often
  bool resident = false;           // `own` is staged once with all ranks, not per step
  int stages = 0;                  // steps in shared memory or in flight
  int64_t column_blocks = 0, token_blocks = 0;
  int64_t splits = 0, split_steps = 0;  // parts of the reduction; steps of each
  int64_t blocks = 0;
  // Offsets into shared memory, in bytes. A stage holds the weight, the activation and `other`, unconverted.
  int activation_at = 0, raw_at = 0, stage_bytes = 0;
  int terms_at = 0, terms_bytes = 0;  // `other` as split terms, double-buffered
  int own_at = 0, own_ranks = 0;
  int sums_at = 0;      // accumulators of the low-rank matmul between two chunks of ranks
  int exchange_at = 0;  // W~ of one step, for the wide tile
  int shared_bytes = 0;
  double cost = 0;
};

constexpr int fused_terms(DType dtype) { return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3; }

constexpr int64_t fused_parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Fills in the offsets and the size of shared memory, from the rest of `c`.
constexpr void lay_out_fused(FusedConfig& c, const FusedShape& s) {
  const int columns = c.columns, depth = c.depth_step;
  const int raw = static_cast<int>(fused_parts(c.ranks * depth / 8, c.threads)) * c.threads * 8;
  c.own_ranks = c.resident ? c.ranks * c.rank_chunks : c.ranks;
  c.activation_at = columns * depth * static_cast<int>(dtype_size(s.weight));
  c.raw_at = c.activation_at + c.token_tile * depth * static_cast<int>(dtype_size(s.activation));
  c.stage_bytes = c.raw_at + raw * static_cast<int>(dtype_size(s.other));
  c.terms_at = c.stage_bytes * c.stages;
  c.terms_bytes = 2 * fused_terms(s.other) * (s.input_gradient ? depth * (c.ranks + kFusedPad) : c.ranks * (depth + kFusedPad));
  c.own_at = c.terms_at + 2 * c.terms_bytes;
  c.sums_at = c.own_at + 2 * fused_terms(s.own) * columns * (c.own_ranks + (s.input_gradient ? 0 : kFusedPad));
  c.exchange_at = c.sums_at + (c.rank_chunks > 1 ? 4 * columns * depth : 0);
  c.shared_bytes = c.exchange_at + (fused_wide(c.token_tile) ? 2 * columns * depth : 0);
  // After the loop the memory of the stages holds the sums of the warps that share columns.
  const int parts = fused_wide(c.token_tile) ? 0 : 4 * (c.depth_warps - 1) * columns * c.token_tile;
  if (parts > c.shared_bytes) c.shared_bytes = parts;
}

// Cost model: bytes through the L2 cache, divided by the busy share of the SMs. The constants are estimates, not measured.
constexpr double fused_cost(const FusedConfig& c, const FusedShape& s, int multiprocessors) {
  const double columns = static_cast<double>(s.columns), depth = static_cast<double>(s.depth);
  const double tokens = static_cast<double>(s.tokens), r = static_cast<double>(s.r);
  const double column_blocks = static_cast<double>(c.column_blocks), token_blocks = static_cast<double>(c.token_blocks);
  const double splits = static_cast<double>(c.splits);
  double bytes = columns * depth * static_cast<double>(dtype_size(s.weight)) * token_blocks;
  bytes += column_blocks * tokens * depth * static_cast<double>(dtype_size(s.activation));
  bytes += column_blocks * token_blocks * r * depth * static_cast<double>(dtype_size(s.other));
  bytes += columns * r * static_cast<double>(dtype_size(s.own)) * token_blocks * (c.resident ? splits : depth / c.depth_step);
  if (c.splits > 1) bytes += 8 * splits * tokens * columns;
  const double launch = c.splits > 1 ? 1 << 22 : 0;  // a second launch costs about as much as 4 MB
  const int64_t waves = fused_parts(c.blocks, multiprocessors);
  const double busy = static_cast<double>(c.blocks) / static_cast<double>(waves * multiprocessors);
  const double late = c.stages == 2 ? 1.2 : c.stages == 3 ? 1.05 : 1.0;  // fewer bytes in flight
  const double few = c.threads >= 256 ? 1.0 : c.threads >= 128 ? 1.2 : 1.5;
  return bytes / busy * late * few * (1 + 0.1 * (c.rank_chunks - 1)) + launch;
}

// The tiling of least cost with this token tile; token_tile = 0 where nothing fits.
constexpr FusedConfig fused_linear_config(const FusedShape& s, int token_tile, DeviceLimits limits) {
  struct Warps {
    int column, depth;
  };
  const int64_t whole = s.r > 16 ? fused_parts(s.r, 16) * 16 : 16;
  const bool wide = fused_wide(token_tile);
  FusedConfig best;
  for (const Warps warps : {Warps{4, 2}, Warps{2, 4}, Warps{1, 8}, Warps{2, 2}, Warps{1, 4}, Warps{1, 2}}) {
    if (wide && (warps.column != 2 || warps.depth != 2)) continue;
    for (const int64_t ranks : {whole, int64_t{64}, int64_t{32}, int64_t{16}}) {
      if (ranks > 256 || (ranks != whole && ranks >= whole)) continue;
      for (const bool resident : {true, false}) {
        FusedConfig c;
        c.token_tile = token_tile;
        c.column_warps = warps.column;
        c.depth_warps = warps.depth;
        c.columns = kFusedWarpColumns * warps.column;
        c.depth_step = kFusedWarpDepth * warps.depth;
        c.depth_log2 = warps.depth == 8 ? 8 : warps.depth == 4 ? 7 : 6;
        c.threads = 32 * warps.column * warps.depth * (wide ? 2 : 1);
        c.ranks = static_cast<int>(ranks);
        const int64_t rank_chunks = fused_parts(whole, ranks);
        if ((resident && rank_chunks * ranks > 4096) || rank_chunks > (1 << 24)) continue;
        c.rank_chunks = static_cast<int>(rank_chunks);
        c.resident = resident;
        if (!resident && c.rank_chunks == 1) continue;
        for (c.stages = kFusedMaxStages; c.stages > 1; --c.stages) {
          lay_out_fused(c, s);
          if (c.shared_bytes <= limits.shared_bytes) break;
        }
        if (c.stages == 1) continue;
        c.column_blocks = fused_parts(s.columns, c.columns);
        c.token_blocks = most_tiles(s.tokens, s.groups, token_tile);
        const int64_t steps = fused_parts(s.depth, c.depth_step), base = c.column_blocks * c.token_blocks;
        for (int waves = 0; waves <= 2; ++waves) {  // 0: not split
          int64_t splits = waves * int64_t{limits.multiprocessors} / base;
          if (splits > steps) splits = steps;
          if (splits < 1) splits = 1;
          c.split_steps = steps > 0 ? fused_parts(steps, splits) : 0;
          c.splits = steps > 0 ? fused_parts(steps, c.split_steps) : 1;
          c.blocks = base * c.splits;
          c.cost = fused_cost(c, s, limits.multiprocessors);
          if (best.token_tile == 0 || c.cost < best.cost) best = c;
        }
      }
    }
  }
  return best;
}

constexpr FusedConfig fused_linear_config(const FusedShape& s, DeviceLimits limits) {
  if (s.activation == DType::float32) return fused_linear_config(s, 16, limits);  // six mma per pair of operands
  for (const int tile : {256, 64}) {
    if (fused_parts(s.tokens, s.groups) <= (tile == 256 ? 64 : 16)) continue;
    const FusedConfig c = fused_linear_config(s, tile, limits);
    if (c.token_tile) return c;
  }
  return fused_linear_config(s, 16, limits);
}

}  // namespace lors::cuda
