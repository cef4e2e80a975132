// SPDX-License-Identifier: Apache-2.0
// The tiling of a pass over Z (dY or X, [tokens, features]), a pure function of the problem and the device. A block has a tile
// of features and iterates over a range of tokens; its warp groups take the steps in round-robin order. It writes fp32 partial
// sums: of projected [tokens, ranks] one per tile of features, of reduced [features, ranks] one per range of tokens.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

namespace lors::cuda {

constexpr int kMaxTileRanks = 64;     // per pass
constexpr int kMaxTokenWarps = 8;     // per warp group, and per block
constexpr int kTokenFeaturePad = 8;   // 16 bytes after each row in shared memory, against bank conflicts of ldmatrix
constexpr int kTokenFactorTerms = 3;  // of P or Q, which are fp32
// Bound on the partial sums of one launch, of each kind, per multiprocessor, so that they are still in the L2 cache when
// reduce_kernel reads them. With more, the tokens are taken in panels.
constexpr int64_t kPartialBytes = 256 * 1024;

// What one warp does, from the number of ranks and of Z's split terms: the kernel's template parameters.
struct TokenTile {
  int ranks = 0;         // 16, 32 or 64
  int terms = 0;         // of Z: 1, 2 or 3
  int tokens = 0;        // in a step
  int stages = 0;        // steps of Z in shared memory
  int reduce_ranks = 0;  // reduce: a warp takes 64 features of so many ranks
  int rank_groups = 0;   // reduce: warps that share 64 features
  int token_groups = 0;  // project: a warp takes tokens / token_groups tokens of 16 ranks,
  int feature_span = 0;  // and so many features
  int min_warps = 0;     // warps of a warp group: this, twice this, ... up to kMaxTokenWarps

  constexpr int features(int warps) const { return 64 * warps / rank_groups; }
  constexpr int feature_groups(int warps) const { return features(warps) / feature_span; }
};

constexpr TokenTile token_tile(int ranks, int terms) {
  TokenTile t;
  t.ranks = ranks;
  t.terms = terms;
  t.tokens = terms == 3 ? 16 : 32;
  t.stages = terms == 1 ? 2 : 1;
  t.reduce_ranks = ranks == 16 || (ranks == 32 && terms == 2) ? 16 : 32;  // float16: 32 do not fit the registers
  t.rank_groups = ranks / t.reduce_ranks;
  t.token_groups = ranks == 16 && t.tokens == 32 ? 2 : 1;
  t.feature_span = 64 * t.token_groups * (ranks / 16) / t.rank_groups;
  t.min_warps = ranks == 64 ? 4 : 2;
  return t;
}

// The smallest tile that holds so many ranks (at most kMaxTileRanks).
constexpr int tile_ranks(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64; }

// Shared memory of a block in bytes: z, token_factor and projected for each warp group, then the factor. At the end the same
// memory holds the fp32 totals of all warp groups but the first.
struct TokenShared {
  int z = 0;             // [stages, terms, tokens, features + pad] 16-bit
  int token_factor = 0;  // [2, kTokenFactorTerms, tokens, ranks] 16-bit; reduce only
  int projected = 0;     // [2, feature groups, tokens, ranks] fp32; project only
  int factor = 0;        // [terms, features, ranks] or [terms, ranks, features + pad] 16-bit; project only
  int warp_group = 0;    // the first three
  int total = 0;
};

constexpr TokenShared token_shared(const TokenTile& t, int warps, int warp_groups, bool project, bool reduce,
                                   int factor_terms) {
  const int features = t.features(warps);
  TokenShared s;
  s.z = 2 * t.stages * t.terms * t.tokens * (features + kTokenFeaturePad);
  if (reduce) s.token_factor = 2 * 2 * kTokenFactorTerms * t.tokens * t.ranks;
  if (project) {
    s.projected = 4 * 2 * t.feature_groups(warps) * t.tokens * t.ranks;
    s.factor = 2 * factor_terms * t.ranks * (features + kTokenFeaturePad);
  }
  s.warp_group = s.z + s.token_factor + s.projected;
  s.total = warp_groups * s.warp_group + s.factor;
  const int totals = reduce ? 4 * (warp_groups - 1) * features * t.ranks : 0;
  if (s.total < totals) s.total = totals;
  return s;
}

struct TokenConfig {
  int warps = 0;             // per warp group. 0: nothing fits the device
  int warp_groups = 0;       // per block
  int features = 0;          // per warp group, and so per block
  int64_t tiles = 0;         // of features
  int64_t panel_tokens = 0;  // tokens of one launch: all, or what keeps the partial sums small
  int64_t range_tokens = 0;  // tokens of one block: whole steps of all warp groups
  int64_t ranges = 0;        // of a panel
  TokenShared shared;
};

struct TokenProblem {
  int64_t tokens = 0;
  int64_t features = 0;
  int64_t width = 0;     // ranks that are kept, 1 to tile.ranks
  bool project = false;  // Z factor [tokens, width] is wanted
  bool reduce = false;   // Z^T token_factor [features, width] is wanted
  int factor_terms = 1;  // of the factor's dtype
};

// Cost model: bytes read by the busiest SM times the number of SMs, more where less than 32 KiB are in flight per SM, plus the
// bytes of partial sums, plus half the bytes of the token factor (the L2 cache has them). Constants are guesses, not measured.
constexpr TokenConfig token_config(const TokenProblem& p, const TokenTile& tile, DeviceLimits limits) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t bytes = tile.terms == 3 ? 4 : 2, processors = limits.multiprocessors > 0 ? limits.multiprocessors : 1;
  TokenConfig best;
  int64_t best_cost = 0;
  for (int warps = kMaxTokenWarps; warps >= tile.min_warps; warps /= 2) {
    for (int warp_groups = 1; warp_groups * warps <= kMaxTokenWarps; warp_groups *= 2) {
      TokenConfig c;
      c.warps = warps;
      c.warp_groups = warp_groups;
      c.features = tile.features(warps);
      c.tiles = ceil_div(p.features, c.features);
      c.shared = token_shared(tile, warps, warp_groups, p.project, p.reduce, p.factor_terms);
      if (c.shared.total > limits.shared_bytes) continue;
      const int64_t step_tokens = warp_groups * tile.tokens, steps = ceil_div(p.tokens, step_tokens);
      int64_t panel_steps = steps;
      if (p.project) {
        const int64_t fit = processors * kPartialBytes / (4 * c.tiles * p.width * step_tokens), least = 256 / step_tokens;
        const int64_t panels = ceil_div(steps, fit > least ? fit : least);
        panel_steps = ceil_div(steps, panels);  // panels of one size
      }
      c.panel_tokens = panel_steps * step_tokens;
      const int64_t panels = ceil_div(steps, panel_steps);
      int64_t resident = limits.shared_bytes / c.shared.total;  // blocks of a multiprocessor
      const int register_warps = tile.terms == 1 && (tile.ranks == 16 || !p.reduce) ? 16 : 8;
      if (resident > register_warps / (warps * warp_groups)) resident = register_warps / (warps * warp_groups);
      // Blocks for an eighth of the multiprocessors, a fourth, a half, and for all of them once, twice, ... eight times.
      int64_t last = 0;
      for (int eighths = 1; eighths <= 64; eighths += eighths < 8 ? eighths : 8) {
        int64_t wanted = processors * eighths / (8 * c.tiles);
        if (wanted > panel_steps) wanted = panel_steps;
        if (wanted < 1) wanted = 1;
        if (wanted == last) continue;
        last = wanted;
        const int64_t range_steps = ceil_div(panel_steps, wanted);
        c.range_tokens = range_steps * step_tokens;
        c.ranges = ceil_div(panel_steps, range_steps);
        const int64_t reduced_bytes = p.reduce ? 4 * p.width * p.features * c.ranges : 0;
        const int64_t projected_bytes = p.project ? 4 * p.width * c.panel_tokens * c.tiles : 0;
        const int64_t token_factor_bytes = p.reduce ? 4 * p.width * c.panel_tokens * c.tiles : 0;
        if (c.ranges > 1 && reduced_bytes > processors * kPartialBytes) break;
        const int64_t each = ceil_div(c.tiles * c.ranges, processors);  // blocks of the busiest multiprocessor
        const int64_t step_bytes = step_tokens * c.features * bytes, enough = 32 * 1024;
        const int64_t in_flight = (each < resident ? each : resident) * step_bytes;
        int64_t cost = processors * each * range_steps * step_bytes;
        if (in_flight < enough) cost = cost / in_flight * enough;
        cost = panels * (cost + reduced_bytes + projected_bytes + token_factor_bytes / 2);
        if (best.warps == 0 || cost < best_cost) {
          best = c;
          best_cost = cost;
        }
      }
    }
  }
  return best;
}

}  // namespace lors::cuda
