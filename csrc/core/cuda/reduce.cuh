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
  void* out = nullptr;    // [rows, columns]
  int64_t out_pitch = 0;  // elements of `out` from row to row
  DType dtype = DType::float32;
  bool add = false;      // out += instead of out =; float32 only
  bool vectors = false;  // set by reduce_partials
};

struct PartialSumsPair {
  PartialSums sums[2];
  unsigned blocks = 0;  // of the first
};

constexpr int kReduceThreads = 128;  // of one slice: four columns each
constexpr int kReduceMaxSlices = 8;  // slice s adds partials s, s + slices, ...

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
  const int64_t at = row * p.out_pitch + column, left = p.columns - column;
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

// One block: kReduceThreads neighbouring fours of the sums. blockDim.x = kReduceThreads * slices.
static __global__ void __launch_bounds__(kReduceThreads* kReduceMaxSlices, 1)
    reduce_kernel(const __grid_constant__ PartialSumsPair pair) {
  const bool second = blockIdx.x >= pair.blocks;
  const PartialSums& p = pair.sums[second];
  const int slices = blockDim.x / kReduceThreads, slice = threadIdx.x / kReduceThreads, thread = threadIdx.x % kReduceThreads;
  const int64_t block = blockIdx.x - (second ? pair.blocks : 0);
  const int64_t at = (block * kReduceThreads + thread) * 4, size = p.rows * p.width;
  float sum[4] = {};
  const auto add = [&](const float4& part) {
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
  };
  if (at < size) {
    if (slice == 0 && p.bias.data != nullptr) {
      const int64_t column = at % p.width;
      float eight[8];
      load_eight(eight, p.bias, 0, column / 8 * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = column % 8 ? eight[4 + i] : eight[i];
    }
    const float* from = p.partials + slice * size + at;
#pragma unroll 4
    for (int64_t i = slice; i < p.count; i += slices, from += slices * size)
      add(ptx::load_global(reinterpret_cast<const float4*>(from)));
  }
  float4* const parts = reinterpret_cast<float4*>(ptx::dynamic_shared()) + thread;
  if (slice > 0) ptx::store_shared(parts + (slice - 1) * kReduceThreads, make_float4(sum[0], sum[1], sum[2], sum[3]));
  __syncthreads();
  if (slice > 0) return;
  for (int other = 0; other < slices - 1; ++other) add(ptx::load_shared(parts + other * kReduceThreads));
  const int64_t row = at / p.width, column = at % p.width;
  if (row < p.rows && column < p.columns) store_result(p, row, column, sum);
}

// Whether the elements of `sums.out` can be written four at a time.
inline bool has_fours(const PartialSums& sums) {
  return sums.out_pitch % 4 == 0 && reinterpret_cast<uintptr_t>(sums.out) % (4 * dtype_size(sums.dtype)) == 0;
}

// One launch for one or two sums.
inline Status reduce_partials(std::initializer_list<PartialSums> all, const CudaHost& host) {
  PartialSumsPair pair;
  int64_t blocks[2] = {}, count = 0;
  int used = 0;
  for (PartialSums sums : all) {
    if (sums.rows == 0 || sums.columns == 0) continue;
    if (sums.add && sums.dtype != DType::float32)
      return Status::error("A sum of partial results is added to float32 only, and was asked to add to a 16-bit dtype.");
    sums.vectors = has_fours(sums);
    if (sums.count == 0) sums.width = (sums.columns + 3) / 4 * 4;
    blocks[used] = (sums.rows * sums.width + 4 * kReduceThreads - 1) / (4 * kReduceThreads);
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
  return launch("the sum of partial results", reduce_kernel, dim3(static_cast<unsigned>(blocks[0] + blocks[1])),
                dim3(static_cast<unsigned>(kReduceThreads * slices)),
                static_cast<int>(sizeof(float4)) * kReduceThreads * (slices - 1), host, pair);
}

}  // namespace lors::cuda
