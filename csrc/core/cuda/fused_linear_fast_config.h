// SPDX-License-Identifier: Apache-2.0
// When fused_linear_fast.cuh serves a fused_linear, and its tiling: pure functions of the problem and the device. One block of
// 512 threads on a multiprocessor.
#pragma once

#include <lors/fused_linear.h>

#include "experts_config.h"
#include "merge_fast_config.h"

namespace lors::cuda {

constexpr int kFusedFastThreads = 512, kFusedFastWarps = kFusedFastThreads / 32;
constexpr int kFusedFastTokens = 16;
// Elements behind each row of shared memory: of the activation in a panel, and of the input gradient's sums.
constexpr int kFusedFastPad = 8, kFusedFastSumsPad = 4;
// The warps' products of two steps, 16 rows x 16 tokens each.
constexpr int kFusedFastSumsBytes = 2 * kFusedFastWarps * 16 * kFusedFastTokens * 4;
// The activation of the lanes' columns, 16 tokens in four vectors each.
constexpr int kFusedFastActivationBytes = 4 * 16 * kFusedFastThreads;

// Behind all: the block's expert and its rows, for which the registers do not suffice.
constexpr int kFusedFastTileBytes = 16;

// Up to 16 tokens, or so many for each expert in the mean, whose dtype is the weight's; from every layout.
inline bool fused_fast_takes(const FusedLinearArgs& a) {
  return fast_path_takes(a, a.activation_dtype) && a.tokens > 0 && a.tokens <= kFusedFastTokens * a.experts.count &&
         a.out_features > 0 && a.in_features > 0;
}

// columns = 0: not served. Every block of columns (forward) or of rows (input gradient) gives a part of the sum.
inline MergeConfig fused_fast_config(const FusedLinearArgs& a, int terms_A, int terms_B, DeviceLimits limits) {
  if (!fused_fast_takes(a)) return {};
  const double r = static_cast<double>(a.r), tokens = static_cast<double>(a.tokens);
  // Beside the adapters: the activation, read once, and the parts of the output, written and read in float32.
  const double activation = 2 * r + 2 * tokens, output = 2 * r + 8 * tokens;
  FastBlocks of{.threads = kFusedFastThreads, .per_multiprocessor = 1};
  of.weight_bytes = (a.weight_layout == Layout::dense ? 2 : 1) + (a.weight_layout != Layout::dense || a.mask ? 0.125 : 0);
  of.row_bytes = a.input_gradient ? activation : output;
  of.column_bytes = a.input_gradient ? output : activation;
  if (a.input_gradient) {
    of.panel_row_shared = 2 * kFusedFastTokens;
    of.shared = of.panel_row_shared * kFusedFastPad;
    for (const int columns : {512, 256})
      of.least_shared =
          std::max(of.least_shared, 4 * kFusedFastTokens * (kFusedFastWarps / (columns / 64)) * (columns + kFusedFastSumsPad));
  } else {
    of.shared = kFusedFastSumsBytes + kFusedFastActivationBytes;
  }
  // Each expert that has rows has blocks of its own.
  const int64_t active = std::min(a.experts.count, a.tokens);
  limits.multiprocessors = std::max(1, static_cast<int>(limits.multiprocessors / active));
  limits.shared_bytes -= kFusedFastTileBytes;
  MergeConfig config = fast_path_config(a, terms_A, terms_B, of, limits);
  config.shared_bytes += kFusedFastTileBytes;
  return config;
}

// The blocks of the launch: those of the tiling for every 16 tokens of an expert.
inline int64_t fused_fast_blocks(const FusedLinearArgs& a, const MergeConfig& c) {
  return c.blocks * most_tiles(a.tokens, a.experts.count, kFusedFastTokens);
}

// Queues the kernel (fused_linear_fast.cu) for such a tiling; the parts are added up by the caller.
struct FusedProblem;
Status fused_linear_fast(const FusedLinearArgs& args, const FusedProblem& problem, const MergeConfig& config,
                         const CudaHost& host);

}  // namespace lors::cuda
