// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0    fp32 accumulate, one rounding
// The merge of merge.cuh for what most calls have (merge_fast_config.h): the same sums and the same bits in fewer instructions.
// A warp takes 16 rows x 64 columns per step. The next step's weights are on their way while this step is computed, and take
// the place of this one's, so that nothing is copied. Launched by merge_fast.cu.
#pragma once

#include "merge_adapters.cuh"
#include "merge_fast_source.cuh"

namespace lors::cuda {

// Where the lane's merged weights go, a Merged for each eight.
template <typename Merged>
struct FastResult {
  uint8_t* to[2];  // row n + 8 h of the next store
  int64_t to_step;

  __device__ __forceinline__ FastResult(const MergeProblem& p, int64_t row, int64_t column, int step) {
    const int64_t pitch = p.in_features * int64_t{sizeof(Merged)} / 8;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      to[h] = static_cast<uint8_t*>(p.merged) + (row + 8 * h) * pitch + column * int64_t{sizeof(Merged)} / 8;
    to_step = step * pitch;
  }
  __device__ __forceinline__ void write(int number, int limit, int h, int c, const Merged& merged) {
    ptx::store_global_if(number, limit, reinterpret_cast<Merged*>(to[h]) + 4 * c, merged);
    if (c == 1) to[h] += to_step;
  }
};

// SourceOf: merge_fast_source.cuh. T: of the weight and the result. kOne: one split term of each adapter and 16 ranks: lora_A's
// operands of the warp's 64 columns then stay in registers.
template <template <typename, typename> typename SourceOf, typename T, bool kOne>
__global__ void __launch_bounds__(kMergeFastThreads, 2) merge_fast_kernel(const MergeProblem p, const int columns) {
  using Lanes = FastLanes<false, kMergeFastThreads>;
  using Source = SourceOf<T, Lanes>;
  using Merged = typename Source::Merged;
  const int lane = threadIdx.x % kWarp;
  const int terms_A = kOne ? 1 : split_terms(p.lora_A.dtype), terms_B = kOne ? 1 : split_terms(p.lora_B.dtype);
  const int chunk = kOne ? 16 : p.chunk;
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* const lora_B = lora_A + terms_A * chunk * (columns + kMergePad);

  FastBlock<Lanes> block(p, columns, blockIdx.x);
  const int64_t first_row = int64_t{block.row_block} * p.rows, first_column = int64_t{block.column_block} * columns;
  stage_lora_A<false>(lora_A, p.lora_A, 0, first_column, chunk, columns);
  Source source(p, columns, block.row, block.column, block.step);
  FastResult<Merged> result(p, block.row, block.column, block.step);
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < 2; ++c) source.load(block.below[c], 8 * h, h, c);

  uint32_t a[4][4];
  if constexpr (kOne) {
    __syncthreads();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      ptx::ldmatrix_x4_trans(a[pair], ptx::shared_address(lora_A + lane % 16 * (columns + kMergePad) + block.warp_column +
                                                          lane / 16 * 8 + 16 * pair));
  }
  for (int panel = 0; panel < block.rows; panel += p.panel_rows) {
    if (panel > 0) __syncthreads();  // the last panel has been read
    stage_lora_B(lora_B, p.lora_B, first_row + panel, 0, p.panel_rows, chunk);
    source.stage(p, first_row + panel, first_column, block.rows - panel);
    __syncthreads();
    const int end = block.rows - panel < p.panel_rows ? block.rows - panel : p.panel_rows;
    uint32_t from_B =
        ptx::shared_address(lora_B + (block.warp_row + lane % 16) * (16 + kMergePad) + lane / 16 * 8);  // where kOne
    source.start(block.warp_row + lane / 4, block.warp_column, end);
    for (int at = 0; at < end; at += block.step) {  // the same steps for all warps
      source.step(p, at, end);
      // sum[c][j][2 h + e]: as in merge.cuh
      float sum[2][4][4];
      if constexpr (kOne) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, from_B);
        from_B += 2 * block.step * (16 + kMergePad);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          ptx::mma_m16n8k16_zero<bfloat16>(sum[i / 4][i % 4], b, a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.f;
        multiply_adapters(sum, lora_A, lora_B, terms_A, terms_B, chunk, columns, p.panel_rows, at + block.warp_row,
                          block.warp_column);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float low[4] = {sum[c][0][2 * h], sum[c][0][2 * h + 1], sum[c][1][2 * h], sum[c][1][2 * h + 1]};
          const float high[4] = {sum[c][2][2 * h], sum[c][2][2 * h + 1], sum[c][3][2 * h], sum[c][3][2 * h + 1]};
          const uint2 first = source.merged(h, c, 0, low, p.scaling), second = source.merged(h, c, 1, high, p.scaling);
          if constexpr (std::is_same_v<Merged, uint4>)
            result.write(block.below[c], 8 * h, h, c, make_uint4(first.x, first.y, second.x, second.y));
          else
            result.write(block.below[c], 8 * h, h, c, make_uint2(first.x, second.x));
          source.load(block.below[c], block.step + 8 * h, h, c);
        }
      block.below[0] -= block.step;
      block.below[1] -= block.step;
    }
  }
}

}  // namespace lors::cuda
