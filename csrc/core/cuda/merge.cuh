// SPDX-License-Identifier: Apache-2.0
// merged[n, k] = kept[n, k] ? weight[n, k] + scaling * sum_r lora_B[n, r] * lora_A[r, k] : +0    fp32 accumulate, one rounding
// One pass for every layout: each stored weight is read once and every result written once, in 16-byte accesses where the
// layout has them; lora_B lora_A stays in registers, and its sums are the same for all layouts, so the same bits come out. With
// r = 0 no adapter is staged or multiplied: the pass decompresses. Launched by merge.cu.
#pragma once

#include "merge_draws.cuh"

namespace lors::cuda {

// lora_A's ranks [rank, rank + chunk) of `columns` columns from `column` on, as terms [chunk][columns + pad]. Within each 32
// columns, pair j of the eight that lane q owns goes to 8 j + 2 q: the mma of position j then leaves it with that lane.
template <bool kSplit>
__device__ __forceinline__ void stage_lora_A(uint16_t* terms, const Matrix& lora_A, int64_t rank, int64_t column, int chunk,
                                             int columns) {
  const int pitch = columns + kMergePad, count = split_terms(lora_A.dtype);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int q = lane % 4, row = lane / 4;  // a warp stores 8 ranks of 32 columns: no two lanes in one bank
  const bool swap = kSplit && (row & 2);   // which takes another order of the pairs in half of the rows here
  for (int task = warp; task < chunk / 8 * (columns / 32); task += warps) {
    const int p = task / (columns / 32) * 8 + row, group = task % (columns / 32) * 32;
    float values[8];
    load_eight(values, lora_A, rank + p, column + group + 8 * q);
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = values[i], high = values[i + 4];
        values[i] = swap ? high : low;
        values[i + 4] = swap ? low : high;
      }
    }
    for (int term = 0; term < count; ++term) {
      uint16_t* to = terms + (term * chunk + p) * pitch + group;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = swap ? i ^ 2 : i;  // the pair is columns 8 q + 2 j and the next
        const int at = kSplit ? 16 * (q / 2) + 8 * (j % 2) + 4 * (q % 2) + 2 * (j / 2) : 8 * j + 2 * q;
        ptx::store_shared(reinterpret_cast<uint32_t*>(to + at), next_term_pair(values[2 * i], values[2 * i + 1]));
      }
    }
  }
}

// `rows` rows of lora_B from `row` on, ranks [rank, rank + chunk), as terms [rows][chunk + pad].
__device__ __forceinline__ void stage_lora_B(uint16_t* terms, const Matrix& lora_B, int64_t row, int64_t rank, int rows,
                                             int chunk) {
  const int pitch = chunk + kMergePad, count = split_terms(lora_B.dtype), eights = chunk / 8;
  for (int task = threadIdx.x; task < rows * eights; task += blockDim.x) {
    // Eight neighbouring lanes take eight rows: their pitch is an odd number of 16-byte units, so no two share a bank.
    const int n = task / (8 * eights) * 8 + task % 8, p = task / 8 % eights * 8;
    float values[8];
    load_eight(values, lora_B, row + n, rank + p);
    for (int term = 0; term < count; ++term) {
      ptx::store_shared(reinterpret_cast<uint4*>(terms + (term * rows + n) * pitch + p), next_terms(values));
    }
  }
}

// The warp's 16 rows x 64 columns of lora_B lora_A, added to `sum`, over one chunk of ranks.
// sum[c][j][2 h + e]: row lane / 4 + 8 h, of the eight columns that the lane owns in the 32 from 32 c on, number 2 j + e.
__device__ __forceinline__ void multiply_adapters(float (&sum)[2][4][4], const uint16_t* lora_A, const uint16_t* lora_B,
                                                  int terms_A, int terms_B, int chunk, int columns, int rows, int row,
                                                  int column) {
  const int lane = threadIdx.x % kWarp, pitch_A = columns + kMergePad, pitch_B = chunk + kMergePad;
  const uint32_t from_A = ptx::shared_address(lora_A + (lane % 16) * pitch_A + column + lane / 16 * 8);
  const uint32_t from_B = ptx::shared_address(lora_B + (row + lane % 16) * pitch_B + lane / 16 * 8);
  // The products of small terms first: their sum is small, and so are the roundings on the way to it.
  int order = terms_A + terms_B - 2;
  for (order = order < kMaxTerms ? order : kMaxTerms - 1; order >= 0; --order) {
    for (int i = 0; i <= order; ++i) {
      const int j = order - i;
      if (i >= terms_A || j >= terms_B) continue;
#pragma unroll 1  // the weights wait in registers: there is no room for more operands at once
      for (int p = 0; p < chunk; p += 16) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, from_B + 2 * (j * rows * pitch_B + p));
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // two mma positions of 8 columns each
          uint32_t a[4];
          ptx::ldmatrix_x4_trans(a, from_A + 2 * ((i * chunk + p) * pitch_A + 16 * pair));
          ptx::mma_m16n8k16<bfloat16>(sum[pair / 2][pair % 2 * 2], b, a[0], a[1]);
          ptx::mma_m16n8k16<bfloat16>(sum[pair / 2][pair % 2 * 2 + 1], b, a[2], a[3]);
        }
      }
    }
  }
}

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
        if (p.draws.rounds || p.draws.noise != nullptr) draw<W, Out>(p, at, h, c, kept, values);
        Sink<W, Out>::store(p, at, source, h, c, values);
      }
    }
  }
}

}  // namespace lors::cuda
