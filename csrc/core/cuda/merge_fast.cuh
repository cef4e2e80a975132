// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0    fp32 accumulate, one rounding
// The merge of merge.cuh for what most calls have (merge_fast_config.h): the same sums and the same bits in fewer instructions.
// A warp takes 16 rows x 64 columns per step. The next step's weights are on their way while this step is computed, and take
// the place of this one's, so that nothing is copied. Launched by merge_fast.cu.
#pragma once

#include "merge_adapters.cuh"
#include "merge_fast_source.cuh"

namespace lors::cuda {

// SourceOf: merge_fast_source.cuh. T: of the weight and the result. kOne: one split term of each adapter and 16 ranks: lora_A's
// operands of the warp's 64 columns then stay in registers.
template <template <typename> typename SourceOf, typename T, bool kOne>
__global__ void __launch_bounds__(kMergeFastThreads, 2) merge_fast_kernel(const MergeProblem p, const int columns) {
  using Source = SourceOf<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, across = columns / 64;
  const int warp_row = warp / across * 16, warp_column = warp % across * 64, step = 16 * kMergeFastWarps / across;
  const int terms_A = kOne ? 1 : split_terms(p.lora_A.dtype), terms_B = kOne ? 1 : split_terms(p.lora_B.dtype);
  const int chunk = kOne ? 16 : p.chunk;
  const int64_t first_row = blockIdx.x / p.column_blocks * p.rows, first_column = blockIdx.x % p.column_blocks * columns;
  const int64_t rest = p.out_features - first_row;
  const int rows = rest < p.rows ? static_cast<int>(rest) : p.rows;
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* const lora_B = lora_A + terms_A * chunk * (columns + kMergePad);

  stage_lora_A<false>(lora_A, p.lora_A, 0, first_column, chunk, columns);
  const int64_t column = first_column + warp_column + lane % 4 * 8;  // of the lane's first eight; the others: 32 further
  const int left = rows - warp_row - lane / 4;                       // rows from the lane's first on; its second is 8 below
  int below[2] = {column < p.in_features ? left : 0, column + 32 < p.in_features ? left : 0};
  Source source(p, columns, first_row + warp_row + lane / 4, column, step);
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < 2; ++c) source.load(below[c], 8 * h, h, c);

  uint32_t a[4][4];
  if constexpr (kOne) {
    __syncthreads();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      ptx::ldmatrix_x4_trans(
          a[pair], ptx::shared_address(lora_A + lane % 16 * (columns + kMergePad) + warp_column + lane / 16 * 8 + 16 * pair));
  }
  for (int panel = 0; panel < rows; panel += p.panel_rows) {
    if (panel > 0) __syncthreads();  // the last panel has been read
    stage_lora_B(lora_B, p.lora_B, first_row + panel, 0, p.panel_rows, chunk);
    source.stage(p, first_row + panel, first_column, rows - panel);
    __syncthreads();
    const int end = rows - panel < p.panel_rows ? rows - panel : p.panel_rows;
    uint32_t from_B = ptx::shared_address(lora_B + (warp_row + lane % 16) * (16 + kMergePad) + lane / 16 * 8);  // where kOne
    source.start(warp_row + lane / 4, warp_column, end);
    for (int at = 0; at < end; at += step) {  // the same steps for all warps
      source.step(p, at, end);
      // sum[c][j][2 h + e]: as in merge.cuh
      float sum[2][4][4];
      if constexpr (kOne) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, from_B);
        from_B += 2 * step * (16 + kMergePad);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          ptx::mma_m16n8k16_zero<bfloat16>(sum[i / 4][i % 4], b, a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.f;
        multiply_adapters(sum, lora_A, lora_B, terms_A, terms_B, chunk, columns, p.panel_rows, at + warp_row, warp_column);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float values[8] = {sum[c][0][2 * h], sum[c][0][2 * h + 1], sum[c][1][2 * h], sum[c][1][2 * h + 1],
                                   sum[c][2][2 * h], sum[c][2][2 * h + 1], sum[c][3][2 * h], sum[c][3][2 * h + 1]};
          source.store(below[c], 8 * h, h, c, values, p.scaling);
          source.load(below[c], step + 8 * h, h, c);
        }
      below[0] -= step;
      below[1] -= step;
    }
  }
}

}  // namespace lors::cuda
