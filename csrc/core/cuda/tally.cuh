// SPDX-License-Identifier: Apache-2.0
// Counting what is wrong and finding the first of it: each thread keeps a Tally, each warp stores one, and one warp adds those
// up. Integers, so the answer does not depend on the order.
#pragma once

#include "operands.cuh"

namespace lors::cuda {

struct Tally {
  int64_t count = 0, first = INT64_MAX, columns = 0;

  __device__ __forceinline__ void add(int64_t at) {
    ++count;
    first = at < first ? at : first;
  }
  __device__ __forceinline__ void merge(const Tally& other) {
    count += other.count;
    first = other.first < first ? other.first : first;
    columns += other.columns;
  }
  // The warp's tally; every lane takes part.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      Tally other;
      other.count = __shfl_xor_sync(0xffffffffu, count, step);
      other.first = __shfl_xor_sync(0xffffffffu, first, step);
      other.columns = __shfl_xor_sync(0xffffffffu, columns, step);
      merge(other);
    }
  }
  // As tallies[warp]; every lane takes part.
  __device__ __forceinline__ void store(Tally* tallies, int64_t warp) {
    reduce();
    if (threadIdx.x % kWarp != 0) return;
    int64_t* const to = reinterpret_cast<int64_t*>(tallies + warp);
    ptx::store_global(to, count);
    ptx::store_global(to + 1, first);
    ptx::store_global(to + 2, columns);
  }
};
static_assert(sizeof(Tally) == 24);

// Whether the element's bits are those of +0.
template <typename T>
__device__ __forceinline__ bool is_plus_zero(const T* element) {
  if constexpr (sizeof(T) == 4)
    return ptx::load_global(reinterpret_cast<const uint32_t*>(element)) == 0;
  else
    return ptx::load_global(reinterpret_cast<const uint16_t*>(element)) == 0;
}

// report[0 .. kWords) = count, first (and columns) over all tallies. One warp.
template <int kWords>
__global__ void __launch_bounds__(kWarp) tally_sum_kernel(const Tally* tallies, int64_t warps, int64_t* report) {
  Tally sum;
  for (int64_t i = threadIdx.x; i < warps; i += kWarp) {
    const int64_t* const from = reinterpret_cast<const int64_t*>(tallies + i);
    Tally other;
    other.count = ptx::load_global(from);
    other.first = ptx::load_global(from + 1);
    other.columns = ptx::load_global(from + 2);
    sum.merge(other);
  }
  sum.reduce();
  if (threadIdx.x != 0) return;
  ptx::store_global(report, sum.count);
  ptx::store_global(report + 1, sum.first);
  if constexpr (kWords > 2) ptx::store_global(report + 2, sum.columns);
}

}  // namespace lors::cuda
