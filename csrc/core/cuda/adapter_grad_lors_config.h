// SPDX-License-Identifier: Apache-2.0
// The tilings of the two launches of the "lors" gradients, pure functions of the problem and the device. A block of the first
// has some tokens and all features; a block of the second some features and all tokens or, where there are few blocks, a range
// of them. In both, warps share a step's depth between them and add up what they have at the end.
#pragma once

#include <lors/cuda_device.h>
#include <lors/types.h>

#include "experts_config.h"

namespace lors::cuda {

constexpr int kLorsWarps = 8;                // most in a block
constexpr int kLorsRanks = 16 * kLorsWarps;  // in one pass: a warp takes 16
constexpr int kLorsPad = 16;                 // bytes after each row in shared memory, against bank conflicts
constexpr int kProjectFeatures = 128;        // of a step of the first launch
constexpr int kMostRanges = 8;               // of tokens in a cluster, whose blocks they are: what every device takes
constexpr int kMBarriersBytes = 32;          // of a block with bulk copies, one mbarrier for each stage
constexpr int kProjectTiles = 4;             // of 16 tokens, most in a block of it

// Steps in shared memory, of which all but one are on their way. size: bytes of an element of dY and X.
constexpr int lors_stages(int size) { return size == 4 ? 3 : 4; }

// Elements from row to row of a tile of `columns`. transposed: as its fragments are read (TermsOf in adapter_grad_lors.cuh).
constexpr int lors_pitch(int columns, int size, bool transposed) {
  return columns + (size == 4 && !transposed ? 2 : 1) * kLorsPad / size;
}

// P and Q are stored as their first bfloat16 split terms. A term more changes a value by less than 2^-17, in the root mean
// square by 2^-18.7. A sum of n terms in float32 is off by sqrt(n) 2^-24 even where every addition rounds to nearest, which is
// more from n = 1535 on: there the third term would be lost in the sum's own error. n is tokens and features together, those of
// the sum for P or Q and of the sum with it.
constexpr int64_t kTwoTermsFrom = 1536;
constexpr int token_terms(int terms, int64_t tokens, int64_t features) {
  return terms < 3 && tokens + features >= kTwoTermsFrom ? 2 : 3;
}

// Ranks of a pass: 16, 32, 64 or 128.
constexpr int lors_width(int64_t ranks) {
  int width = 16;
  while (width < ranks && width < kLorsRanks) width *= 2;
  return width;
}

constexpr int64_t lors_parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Whether the second launch takes clusters and bulk copies. vectors: the rows of dY and X are aligned.
constexpr bool gradients_in_clusters(int architecture, DType dtype, bool vectors) {
  return has_clusters(architecture) && dtype == DType::bfloat16 && vectors;
}

// Of one of the launches. features: of X and dY; 0 where the launch has nothing to do with it.
struct LorsShape {
  int64_t tokens = 0;
  int64_t experts = 0;  // 0: one has all tokens
  int64_t features[2] = {};
  int size = 2;                 // bytes of an element of dY and X
  int factor_size[2] = {2, 2};  // of lora_A and lora_B
  int terms = 3;                // of P and Q
  bool clusters = false;        // gradients_in_clusters
  int width = 16;
};

struct ProjectConfig {
  int token_tiles = 0;  // of 16 tokens in a block. 0: nothing fits the device
  int factor_at = 0;    // bytes from a stage's tile of dY or X to that of the factor
  int stage = 0;        // bytes
  int shared_bytes = 0;
  int64_t blocks = 0;  // of X and of dY each
};

// Many tokens in a block, because each reads the whole factor, while there are blocks for every multiprocessor.
constexpr ProjectConfig project_config(const LorsShape& s, DeviceLimits limits) {
  const int sides = (s.features[0] > 0) + (s.features[1] > 0);
  const int by_rank = s.width * lors_pitch(kProjectFeatures, s.factor_size[0], false) * s.factor_size[0];
  const int by_feature = kProjectFeatures * lors_pitch(s.width, s.factor_size[1], true) * s.factor_size[1];
  ProjectConfig best;
  for (int tiles = 1; tiles <= kProjectTiles; tiles *= 2) {
    ProjectConfig c;
    c.token_tiles = tiles;
    c.factor_at = 16 * tiles * lors_pitch(kProjectFeatures, s.size, false) * s.size;
    c.stage = c.factor_at + (by_rank > by_feature ? by_rank : by_feature);
    const int sums = kLorsWarps * 16 * tiles * 16 * 4;
    c.shared_bytes = lors_stages(s.size) * c.stage;
    if (c.shared_bytes < sums) c.shared_bytes = sums;
    c.blocks = most_tiles(s.tokens, s.experts > 0 ? s.experts : 1, 16 * tiles);
    if (c.shared_bytes > limits.shared_bytes || (tiles > 1 && sides * c.blocks < limits.multiprocessors)) break;
    best = c;
  }
  return best;
}

struct GradientConfig {
  int feature_groups = 0;  // of 64 features in a block. 0: nothing fits the device
  int token_groups = 0;    // warps that share the features and 16 ranks
  int step_tokens = 0;
  int terms_at = 0;  // bytes from a stage's tile of dY or X to that of P or Q
  int stage = 0;     // bytes
  int mbarriers_at = 0;
  int shared_bytes = 0;
  int64_t tiles[2] = {};     // of features
  int64_t range_tokens = 0;  // of a block: whole steps
  int64_t ranges = 0;

  constexpr int warps(int width) const { return feature_groups * token_groups * width / 16; }
};

// Floats that a warp's sums, [64, 16] or transposed, take in shared memory.
constexpr int kLorsTransposedPitch = 68;
constexpr int kLorsWarpSums = 16 * kLorsTransposedPitch;

// Wide blocks for many ranks, because each reads all of P or Q, while there are blocks for every multiprocessor. Ranges only
// where there are fewer, and as long as partial sums are at most an eighth of what is read; not of experts, whose numbers of
// tokens are not known here.
constexpr GradientConfig gradient_config(const LorsShape& s, DeviceLimits limits) {
  const int rank_groups = s.width / 16;
  GradientConfig best;
  for (int groups = 1; groups <= 2 && groups * rank_groups <= kLorsWarps; groups *= 2) {
    if (groups == 2 && rank_groups == 1) break;
    GradientConfig c;
    c.feature_groups = groups;
    for (c.token_groups = kLorsWarps / (groups * rank_groups); c.token_groups > 0; c.token_groups /= 2) {
      c.step_tokens = 16 * (c.token_groups < 4 ? 4 : c.token_groups);
      c.terms_at = c.step_tokens * lors_pitch(64 * groups, s.size, true) * s.size;
      c.stage = c.terms_at + 2 * s.terms * c.step_tokens * lors_pitch(s.width, 2, true);
      const int sums = c.warps(s.width) * kLorsWarpSums * 4;
      c.shared_bytes = lors_stages(s.size) * c.stage;
      if (c.shared_bytes < sums) c.shared_bytes = sums;
      c.mbarriers_at = c.shared_bytes;
      if (s.clusters) c.shared_bytes += kMBarriersBytes;
      if (c.shared_bytes <= limits.shared_bytes) break;
    }
    if (c.token_groups == 0) break;
    for (int side = 0; side < 2; ++side) c.tiles[side] = lors_parts(s.features[side], 64 * groups);
    const int64_t tiles = (c.tiles[0] + c.tiles[1]) * (s.experts > 0 ? s.experts : 1);
    const int64_t steps = lors_parts(s.tokens, c.step_tokens);
    const int64_t least = lors_parts(16 * s.width, c.step_tokens);
    int64_t wanted = limits.multiprocessors / (tiles > 0 ? tiles : 1);
    if (wanted > steps / least) wanted = steps / least;
    if (s.clusters && wanted > kMostRanges) wanted = kMostRanges;
    if (wanted < 1 || s.experts > 0) wanted = 1;
    const int64_t range_steps = lors_parts(steps, wanted);
    c.range_tokens = range_steps * c.step_tokens;
    c.ranges = lors_parts(steps, range_steps);
    if (groups > 1 && tiles * c.ranges < limits.multiprocessors) break;
    best = c;
  }
  return best;
}

}  // namespace lors::cuda
