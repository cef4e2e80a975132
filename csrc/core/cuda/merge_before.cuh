// SPDX-License-Identifier: Apache-2.0
// before[n, b] = popcount of the mask bits of row n before column b * columns: where a block of the bitmap merge finds its
// values.
#pragma once

#include "merge_problem.cuh"

namespace lors::cuda {

constexpr int kBeforeThreads = 256;

// One warp per row, each lane four words of it at a time.
__global__ void __launch_bounds__(kBeforeThreads)
    bitmap_before_kernel(const MergeProblem p, uint32_t* before, int columns, const ExpertRows experts) {
  const int64_t n = (int64_t{blockIdx.x} * kBeforeThreads + threadIdx.x) / kWarp;
  if (n >= p.out_features * experts.count) return;
  constexpr int kRows = 0x7fffffff;
  const int expert = static_cast<int>(n / p.out_features);
  if (experts.offsets && experts.end(expert, kRows) <= experts.begin(expert, kRows)) return;
  // What the last block has is before nothing.
  const int lane = threadIdx.x % kWarp, words = columns / 32, last = static_cast<int>(p.column_blocks - 1) * words;
  const uint32_t* const row = reinterpret_cast<const uint32_t*>(p.index + n * p.index_pitch);
  uint32_t carry = 0;
  for (int first = 0; first <= last; first += 4 * kWarp) {
    const int word = first + 4 * lane;
    uint32_t count = 0;
    if (p.index_vectors && word < last) {
      const uint4 v = ptx::load_global(reinterpret_cast<const uint4*>(row + word));
      count = __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
    } else {
      for (int i = word; i < word + 4 && i < last; ++i) count += __popc(ptx::load_global(row + i));
    }
    uint32_t sum = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    if (word <= last && word % words == 0) ptx::store_global(before + n * p.column_blocks + word / words, carry + sum - count);
    carry += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

}  // namespace lors::cuda
