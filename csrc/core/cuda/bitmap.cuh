// SPDX-License-Identifier: Apache-2.0
// Weights [N, K] of layout "bitmap" (lors/bitmap.h): the kept values of each row one after the other, a bit per weight, and
// where each row begins. One warp per row; a lane per column of a word where values move. Launched by bitmap.cu.
#pragma once

#include "operands.cuh"
#include "tally.cuh"

namespace lors::cuda {

constexpr int kBitmapThreads = 256;

struct BitmapProblem {
  void* weight;          // [N, K] of the kernel's type T
  const uint32_t* bits;  // [N, words]
  int64_t* row_offsets;  // [N + 1]
  void* values;          // [row_offsets[N]] of type T
  Tally* tallies;        // [warps of the grid]
  int64_t out_features, in_features, words;
  int64_t count;  // how many values there are; validation only
};

// The warp's row; N or more where there is none.
__device__ __forceinline__ int64_t row_of_warp() { return (int64_t{blockIdx.x} * kBitmapThreads + threadIdx.x) / kWarp; }

// How many bits are set in a row; in every lane.
__device__ __forceinline__ int64_t bits_in_row(const BitmapProblem& p, int64_t n) {
  int64_t count = 0;
  for (int64_t w = threadIdx.x % kWarp; w < p.words; w += kWarp) count += __popc(ptx::load_global(p.bits + n * p.words + w));
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
  return count;
}

// row_offsets[n + 1] = bits in row n: bitmap_scan_kernel adds them up.
__global__ void __launch_bounds__(kBitmapThreads) bitmap_count_kernel(const BitmapProblem p) {
  const int64_t n = row_of_warp();
  if (n >= p.out_features) return;
  const int64_t count = bits_in_row(p, n);
  if (threadIdx.x % kWarp == 0) ptx::store_global(p.row_offsets + n + 1, count);
}

// row_offsets[n + 1] += row_offsets[n], from the first row on, and row_offsets[0] = 0. One warp: 32 rows at a time.
__global__ void __launch_bounds__(kWarp) bitmap_scan_kernel(const BitmapProblem p) {
  const int lane = threadIdx.x;
  if (lane == 0) ptx::store_global(p.row_offsets, int64_t{0});
  int64_t before = 0;
  for (int64_t first = 0; first < p.out_features; first += kWarp) {
    const int64_t n = first + lane;
    int64_t sum = n < p.out_features ? ptx::load_global(p.row_offsets + n + 1) : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    if (n < p.out_features) ptx::store_global(p.row_offsets + n + 1, before + sum);
    before += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

// Between a row of the weight and its values. kCompress: values from weight, a kept -0 as +0; else weight from values.
template <typename T, bool kCompress>
__global__ void __launch_bounds__(kBitmapThreads) bitmap_move_kernel(const BitmapProblem p) {
  const int64_t n = row_of_warp();
  if (n >= p.out_features) return;
  const int lane = threadIdx.x % kWarp;
  T* const row = static_cast<T*>(p.weight) + n * p.in_features;
  T* values = static_cast<T*>(p.values) + ptx::load_global(p.row_offsets + n);
  for (int64_t w = 0; w < p.words; ++w) {
    const uint32_t bits = ptx::load_global(p.bits + n * p.words + w);
    const int64_t k = 32 * w + lane;
    T* const value = values + __popc(bits & ((1u << lane) - 1));
    const bool kept = bits >> lane & 1;
    if constexpr (kCompress) {
      if (kept) ptx::store_global(value, from_float<T>(to_float(ptx::load_global(row + k)) + 0.f));
    } else {
      if (k < p.in_features) ptx::store_global(row + k, kept ? ptx::load_global(value) : from_float<T>(0.f));
    }
    values += __popc(bits);
  }
}

// Rows whose offsets disagree with their bits, or that have bits beyond K. No offset is used to read anything.
__global__ void __launch_bounds__(kBitmapThreads) bitmap_validate_kernel(const BitmapProblem p) {
  const int64_t n = row_of_warp();
  Tally tally;
  if (n < p.out_features) {
    const int64_t count = bits_in_row(p, n);
    if (threadIdx.x % kWarp == 0) {
      // Unsigned, so that no difference of absurd offsets overflows.
      const uint64_t begin = static_cast<uint64_t>(ptx::load_global(p.row_offsets + n));
      const uint64_t end = static_cast<uint64_t>(ptx::load_global(p.row_offsets + n + 1));
      bool good = end - begin == static_cast<uint64_t>(count);
      if (n == 0) good = good && begin == 0;
      if (n + 1 == p.out_features) good = good && end == static_cast<uint64_t>(p.count);
      if (p.in_features % 32 != 0) good = good && ptx::load_global(p.bits + (n + 1) * p.words - 1) >> (p.in_features % 32) == 0;
      if (!good) tally.add(n);
    }
  }
  tally.store(p.tallies, n);
}

}  // namespace lors::cuda
