// SPDX-License-Identifier: Apache-2.0
// lora_B lora_A of the merge on tensor cores: both adapters as split terms in shared memory, and the product of a warp's tile.
// The same sums in the same order for every layout and path, so the same bits come out.
#pragma once

#include "merge_config.h"
#include "operands.cuh"

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

}  // namespace lors::cuda
