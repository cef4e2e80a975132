// SPDX-License-Identifier: Apache-2.0
// out = scale * (bias + sum_i partials[i]) (+ out): adds up the partial sums [count, rows, width] that the blocks of another
// kernel wrote. The order of the additions depends on the counts alone, so results are bit-reproducible. For every family.
#pragma once

#include <initializer_list>
#include <string>

#include "launch.h"
#include "operands.cuh"

namespace lors::cuda {

struct PartialSums {
  const float* partials = nullptr;  // [count, rows, width], aligned to 16 bytes
  int64_t count = 0;
  int64_t rows = 0;
  int64_t width = 0;    // a multiple of 4
  int64_t columns = 0;  // how many of `width` go to `out`
  float scale = 1.f;
  Matrix bias;            // [1, columns]; data null: none
  void* out = nullptr;    // [rows, columns], or [columns, rows] where `transpose`
  int64_t out_pitch = 0;  // elements of `out` from row to row
  DType dtype = DType::float32;
  bool transpose = false;
  bool add = false;      // out += instead of out =; float32 only
  bool vectors = false;  // set by reduce_partials
};

struct PartialSumsPair {
  PartialSums sums[2];
  unsigned blocks = 0;  // of the first
};

constexpr int kReduceRows = 32, kReduceColumns = 16;
constexpr int kReduceThreads = kReduceRows * kReduceColumns / 4;  // of one slice: four columns each
constexpr int kReduceMaxSlices = 8;                               // slice s adds partials s, s + slices, ...
// Floats from column to column of a transposed tile: no bank conflicts in stores of 8 rows x 4 columns and in 8-byte loads.
constexpr int kReducePitch = kReduceRows + 2;
constexpr int kReduceTile = kReduceColumns * kReducePitch;

// `count` elements (1 to 4) at element `at` of the result.
template <typename T>
__device__ __forceinline__ void store_sums(const PartialSums& p, int64_t at, int64_t count, const float (&sum)[4]) {
  T* const out = static_cast<T*>(p.out) + at;
  if (p.vectors && count >= 4) {
    if constexpr (std::is_same_v<T, float>)
      ptx::store_global(reinterpret_cast<float4*>(out), make_float4(sum[0], sum[1], sum[2], sum[3]));
    else
      ptx::store_global(reinterpret_cast<uint2*>(out),
                        make_uint2(rounded_pair<T>(sum[0], sum[1]), rounded_pair<T>(sum[2], sum[3])));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) ptx::store_global(out + i, from_float<T>(sum[i]));
}

// Elements [column, column + 4) of a row of the result, as far as it has them, from sums that are not scaled yet.
__device__ __forceinline__ void store_result(const PartialSums& p, int64_t row, int64_t column, float (&sum)[4]) {
  const int64_t at = row * p.out_pitch + column, left = (p.transpose ? p.rows : p.columns) - column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[i] *= p.scale;
    if (p.add && i < left) sum[i] += ptx::load_global(static_cast<const float*>(p.out) + at + i);
  }
  if (p.dtype == DType::bfloat16)
    store_sums<bfloat16>(p, at, left, sum);
  else if (p.dtype == DType::float16)
    store_sums<float16>(p, at, left, sum);
  else
    store_sums<float>(p, at, left, sum);
}

// One block: a tile of 32 rows and 16 columns. blockDim.x = kReduceThreads * slices.
template <bool kTranspose>
__global__ void __launch_bounds__(kReduceThreads* kReduceMaxSlices, 1) reduce_kernel(const __grid_constant__ PartialSumsPair pair) {
  const bool second = blockIdx.x >= pair.blocks;
  const PartialSums& p = pair.sums[second];
  const int64_t block = blockIdx.x - (second ? pair.blocks : 0);
  float* const tiles = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int slices = blockDim.x / kReduceThreads, slice = threadIdx.x / kReduceThreads, thread = threadIdx.x % kReduceThreads;
  const int64_t column_tiles = (p.columns + kReduceColumns - 1) / kReduceColumns;
  const int64_t first_row = block / column_tiles * kReduceRows;
  const int64_t first_column = block % column_tiles * kReduceColumns;
  const int tile_row = thread / 4, tile_column = thread % 4 * 4;

  float sum[4] = {};
  if (first_row + tile_row < p.rows && first_column + tile_column < p.width) {
    if (slice == 0 && p.bias.data != nullptr) {
      float eight[8];
      load_eight(eight, p.bias, 0, first_column + tile_column / 8 * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = tile_column % 8 ? eight[4 + i] : eight[i];
    }
    const int64_t size = p.rows * p.width;
    const float* from = p.partials + slice * size + (first_row + tile_row) * p.width + first_column + tile_column;
#pragma unroll 4
    for (int64_t i = slice; i < p.count; i += slices, from += slices * size) {
      const float4 partial = ptx::load_global(reinterpret_cast<const float4*>(from));
      sum[0] += partial.x;
      sum[1] += partial.y;
      sum[2] += partial.z;
      sum[3] += partial.w;
    }
  }
  float* const tile = tiles + slice * kReduceTile;
  if constexpr (kTranspose) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::store_shared(tile + (tile_column + i) * kReducePitch + tile_row, sum[i]);
  } else {
    ptx::store_shared(reinterpret_cast<float4*>(tile) + thread, make_float4(sum[0], sum[1], sum[2], sum[3]));
  }
  __syncthreads();
  if (slice != 0) return;

  // Each thread writes four neighbours of the result: along a row of the partial sums, or down a column where transposed.
  const int out_row = kTranspose ? thread / 8 : tile_row, out_column = kTranspose ? thread % 8 * 4 : tile_column;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = 0.f;
  for (int s = 0; s < slices; ++s) {
    const float* from = tiles + s * kReduceTile;
    if constexpr (kTranspose) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 part = ptx::load_shared(reinterpret_cast<const float2*>(from + out_row * kReducePitch + out_column + i));
        sum[i] += part.x;
        sum[i + 1] += part.y;
      }
    } else {
      const float4 part = ptx::load_shared(reinterpret_cast<const float4*>(from) + thread);
      sum[0] += part.x;
      sum[1] += part.y;
      sum[2] += part.z;
      sum[3] += part.w;
    }
  }
  const int64_t row = (kTranspose ? first_column : first_row) + out_row;
  const int64_t column = (kTranspose ? first_row : first_column) + out_column;
  if (row < (kTranspose ? p.columns : p.rows) && column < (kTranspose ? p.rows : p.columns)) store_result(p, row, column, sum);
}

// The sum of one of several panels: float32 [rows, width] in `total`, overwritten by the first panel and added to by the
// others. Afterwards `sums` itself, over `total` as its only partial, scales and rounds once.
inline PartialSums panel_sums(PartialSums sums, float* total, bool first) {
  sums.columns = sums.out_pitch = sums.width;
  sums.scale = 1.f;
  sums.out = total;
  sums.dtype = DType::float32;
  sums.transpose = false;
  sums.add = !first;
  return sums;
}

// Whether the elements of `sums.out` can be written four at a time.
inline bool has_fours(const PartialSums& sums) {
  return sums.out_pitch % 4 == 0 && reinterpret_cast<uintptr_t>(sums.out) % (4 * dtype_size(sums.dtype)) == 0;
}

// One launch for one or two sums; the second is of the same `transpose`.
inline Status reduce_partials(std::initializer_list<PartialSums> all, const CudaHost& host) {
  PartialSumsPair pair;
  int64_t blocks[2] = {}, count = 0;
  int used = 0;
  for (PartialSums sums : all) {
    if (sums.rows == 0 || sums.columns == 0) continue;
    if (sums.add && sums.dtype != DType::float32)
      return Status::error("A sum of partial results is added to float32 only, and was asked to add to a 16-bit dtype.");
    sums.vectors = has_fours(sums);
    blocks[used] = (sums.rows + kReduceRows - 1) / kReduceRows * ((sums.columns + kReduceColumns - 1) / kReduceColumns);
    if (blocks[0] + blocks[1] > 0x7fffffff)
      return Status::error("A sum of [" + std::to_string(sums.rows) + ", " + std::to_string(sums.columns) +
                           "] takes more blocks than CUDA launches; split the call.");
    if (sums.count > count) count = sums.count;
    pair.sums[used++] = sums;
  }
  if (used == 0) return {};
  pair.blocks = static_cast<unsigned>(blocks[0]);
  int slices = 1;
  while (slices < kReduceMaxSlices && count > 4 * slices) slices *= 2;
  return launch("the sum of partial results", pair.sums[0].transpose ? reduce_kernel<true> : reduce_kernel<false>,
                dim3(static_cast<unsigned>(blocks[0] + blocks[1])), dim3(static_cast<unsigned>(kReduceThreads * slices)),
                static_cast<int>(sizeof(float)) * kReduceTile * slices, host, pair);
}

}  // namespace lors::cuda
