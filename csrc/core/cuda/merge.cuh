// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0    fp32 accumulate, one rounding
// One pass: every weight is read once and every result written once, in 16-byte accesses; the low-rank product stays in
// registers. Launched by merge.cu.
#pragma once

#include "merge_tile.cuh"

namespace lors::cuda {

template <typename W, typename Out>
__global__ void __launch_bounds__(512, 1) merge_kernel(const MergeProblem p) {
  const int columns = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int planes_A = split_terms(p.lora_A.dtype), planes_B = split_terms(p.lora_B.dtype);
  const int64_t first_row = blockIdx.x / p.column_blocks * p.rows, first_column = blockIdx.x % p.column_blocks * columns;
  const int warp_row = warp % 2 * 16, warp_column = warp / 2 * 64;
  constexpr bool kSplit = kSplitColumns<W, Out>;
  const int64_t group = first_column + warp_column, column = group + lane % 4 * (kSplit ? 4 : 8);
  const int64_t left = p.out_features - first_row;
  const int rows = left < p.rows ? static_cast<int>(left) : p.rows;
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* const lora_B = lora_A + planes_A * p.chunk * (columns + kMergePad);
  const bool resident = p.chunk >= p.lora_A.rows;  // all ranks fit: lora_A is staged once, lora_B once per panel of rows

  if (resident) stage_lora_A<kSplit>(lora_A, p.lora_A, 0, first_column, p.chunk, columns);
  for (int step = 0; step < rows; step += kMergeStepRows) {
    const int panel_step = step & (p.panel_rows - 1);
    if (resident && panel_step == 0) {
      if (step > 0) __syncthreads();  // the last panel has been read
      stage_lora_B(lora_B, p.lora_B, first_row + step, 0, p.panel_rows, p.chunk);
      __syncthreads();
    }
    const int64_t row = first_row + step + warp_row + lane / 4;
    Eight<W> tile[2][2];  // [h][c]: rows 8 h on, columns 32 c on
    const auto load = [&] {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int64_t n = row + 8 * h;
          tile[h][c] = load_columns<W, kSplit>(static_cast<const W*>(p.weight) + n * p.in_features, column + 32 * c,
                                               n < p.out_features ? p.in_features : 0, p.weight_vectors);
        }
    };
    // On its way while the adapters are multiplied, but for a float32 weight rounded to 16 bits, whose registers do not
    // suffice.
    constexpr bool kLate = std::is_same_v<W, float> && !std::is_same_v<Out, float>;
    if constexpr (!kLate) load();
    float sum[2][4][4] = {};
    if (resident) {
      multiply_adapters(sum, lora_A, lora_B, planes_A, planes_B, p.chunk, columns, p.panel_rows, panel_step + warp_row,
                        warp_column);
    } else {
      for (int64_t rank = 0; rank < p.lora_A.rows; rank += p.chunk) {
        __syncthreads();  // the last chunk has been read
        stage_lora_A<kSplit>(lora_A, p.lora_A, rank, first_column, p.chunk, columns);
        stage_lora_B(lora_B, p.lora_B, first_row + step, rank, kMergeStepRows, p.chunk);
        __syncthreads();
        multiply_adapters(sum, lora_A, lora_B, planes_A, planes_B, p.chunk, columns, kMergeStepRows, warp_row, warp_column);
      }
    }
    if constexpr (kLate) load();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = row + 8 * h;
      if (n >= p.out_features) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t k = column + 32 * c;
        float values[8];
        tile[h][c].get(values);
        uint32_t kept = 0;
        if (p.mask != nullptr) {
          const int q = lane % 4;
          if (k < p.in_features) kept = ptx::load_global(p.mask + n * p.mask_words + (group + 32 * c) / 32);
          kept = kSplit ? (kept >> (4 * q) & 0xf) | (kept >> (16 + 4 * q) & 0xf) << 4 : kept >> (8 * q);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) kept |= uint32_t(values[i] != 0.f) << i;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = kept >> i & 1 ? fmaf(p.scaling, sum[c][i / 2][2 * h + i % 2], values[i]) : 0.f;
        Eight<Out> out;
        out.set(values);
        store_columns<Out, kSplit>(static_cast<Out*>(p.merged) + n * p.in_features, k, p.in_features, p.merged_vectors, out);
      }
    }
  }
}

}  // namespace lors::cuda
