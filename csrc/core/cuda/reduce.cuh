// SPDX-License-Identifier: Apache-2.0
// out = scale * (bias + sum_i partials[i]) (+ out): adds up the partial sums [count, rows, width] that the blocks of another
// kernel wrote. The order of the additions depends on the counts alone, so results are bit-reproducible. For every family;
// store_result also for kernels that have no partial sums.
#pragma once

#include <initializer_list>

#include "experts.cuh"
#include "launch.h"

namespace lors::cuda {

struct PartialSums {
  const float* partials = nullptr;  // [count, rows, width], aligned to 16 bytes
  int64_t count = 0;
  int64_t rows = 0;
  int64_t width = 0;    // a multiple of 4
  int64_t columns = 0;  // how many of `width` go to `out`
  float scale = 1.f;
  Matrix bias;            // [experts, columns]; data null: none
  ExpertRows experts{};   // of the rows; those beyond the last offset are zero, whatever their partial sums are
  void* out = nullptr;    // [rows, columns]
  int64_t out_pitch = 0;  // elements of `out` from row to row
  DType dtype = DType::float32;
  bool add = false;      // out += instead of out =; float32 only
  bool vectors = false;  // set by reduce_partials
};

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

// Whether the elements of `sums.out` can be written four at a time.
inline bool has_fours(const PartialSums& sums) {
  return sums.out_pitch % 4 == 0 && reinterpret_cast<uintptr_t>(sums.out) % (4 * dtype_size(sums.dtype)) == 0;
}

// Queues one launch for one or two sums (reduce.cu).
Status reduce_partials(std::initializer_list<PartialSums> all, const CudaHost& host);

}  // namespace lors::cuda
