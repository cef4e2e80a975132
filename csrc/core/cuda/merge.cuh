// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0    fp32 accumulate, one rounding
// One pass for every layout: each stored weight is read once and every result written once, in 16-byte accesses where the
// layout has them; lora_B lora_A stays in registers, and its sums are the same for all layouts, so the same bits come out. With
// r = 0 no adapter is staged or multiplied: the pass decompresses. Quantised weights are requantised before the rounding, if
// asked for (lors/quantization.h). Launched by merge.cu.
#pragma once

#include "merge_adapters.cuh"
#include "merge_draws.cuh"

namespace lors::cuda {

// Source, Sink: merge_source.cuh.
template <template <typename, typename> typename SourceOf, template <typename, typename> typename Sink, typename W,
          typename Out>
__global__ void __launch_bounds__(512, 1) merge_kernel(const MergeProblem p) {
  using Source = SourceOf<W, Out>;
  constexpr bool kSplit = kSplitColumns<W, Out>;
  const int columns = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int terms_A = split_terms(p.lora_A.dtype), terms_B = split_terms(p.lora_B.dtype);
  const int64_t first_row = blockIdx.x / p.column_blocks * p.rows, first_column = blockIdx.x % p.column_blocks * columns;
  const int warp_row = warp % 2 * 16, warp_column = warp / 2 * 64;
  const int64_t left = p.out_features - first_row;
  const int rows = left < p.rows ? static_cast<int>(left) : p.rows;
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* const lora_B = lora_A + terms_A * p.chunk * (columns + kMergePad);
  const bool resident = p.chunk >= p.lora_A.rows;  // all ranks fit: lora_A is staged once, lora_B once per panel of rows
  Source source(p);

  if (resident) stage_lora_A<kSplit>(lora_A, p.lora_A, 0, first_column, p.chunk, columns);
  for (int step = 0; step < rows; step += kMergeStepRows) {
    const int panel_step = step & (p.panel_rows - 1);
    const int64_t panel_row = first_row + step - panel_step;
    if (panel_step == 0) {
      if (step > 0) __syncthreads();  // the last panel has been read
      if (resident) stage_lora_B(lora_B, p.lora_B, panel_row, 0, p.panel_rows, p.chunk);
      source.stage(p, panel_row, first_column);
      __syncthreads();
    }
    const Lane at{panel_row, first_column + warp_column, panel_step + warp_row + lane / 4, warp_column / 32, lane % 4};
    if constexpr (!Source::kLate) source.fetch(p, at);
    float sum[2][4][4] = {};
    if (resident) {
      multiply_adapters(sum, lora_A, lora_B, terms_A, terms_B, p.chunk, columns, p.panel_rows, panel_step + warp_row,
                        warp_column);
    } else {
      for (int64_t rank = 0; rank < p.lora_A.rows; rank += p.chunk) {
        __syncthreads();  // the last chunk has been read
        stage_lora_A<kSplit>(lora_A, p.lora_A, rank, first_column, p.chunk, columns);
        stage_lora_B(lora_B, p.lora_B, first_row + step, rank, kMergeStepRows, p.chunk);
        __syncthreads();
        multiply_adapters(sum, lora_A, lora_B, terms_A, terms_B, p.chunk, columns, kMergeStepRows, warp_row, warp_column);
      }
    }
    if constexpr (Source::kLate) source.fetch(p, at);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (at.n(h) >= p.out_features) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float values[8];
        const uint32_t kept = source.expand(p, at, h, c, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = kept >> i & 1 ? fmaf(p.scaling, sum[c][i / 2][2 * h + i % 2], values[i]) : 0.f;
        if constexpr (requires { source.requantize(p, at, h, c, kept, values); }) source.requantize(p, at, h, c, kept, values);
        if (p.draws.rounds || p.draws.noise != nullptr) draw<W, Out>(p, at, h, c, kept, values);
        Sink<W, Out>::store(p, at, source, h, c, values);
      }
    }
  }
}

}  // namespace lors::cuda
