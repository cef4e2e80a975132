// SPDX-License-Identifier: Apache-2.0
// How merge_fast.cuh reads each layout and writes the result. A lane owns eight columns in each of the two times 32 columns of
// its warp (c = 0, 1) of the rows n and n + 8 (h = 0, 1), and moves down by `step` rows. A Source<T> offers
//   Source(p, columns, row, column, step)       row, column: the lane's first
//   load(wanted, h, c)                          starts the loads of the next eight weights down from the last, c = 0 before c = 1
//   stage(p, row, column, rows)                 by the whole block, for the panel of rows from `row` on, of which `rows` exist
//   start(row, column)                          after a barrier: the lane's first row of the panel, the warp's column of the block
//   step(p, at, rows)                           by the whole block, before the step at row `at` of the panel, of `rows`
//   store(wanted, h, c, sum, scaling)           merges and writes the eight last loaded: `sum` is their lora_B lora_A
#pragma once

#include "merge_fast_config.h"
#include "merge_source.cuh"

namespace lors::cuda {

// Two neighbouring weights, merged.
template <typename T>
__device__ __forceinline__ uint32_t merge_pair(uint32_t weights, float low, float high, float scaling) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return rounded_pair<T>(fmaf(scaling, low, __uint_as_float(weights << 16)),
                           fmaf(scaling, high, __uint_as_float(weights & 0xffff0000u)));
  } else {
    return rounded_pair<T>(fmaf(scaling, low, to_float(__ushort_as_half(static_cast<unsigned short>(weights)))),
                           fmaf(scaling, high, to_float(__ushort_as_half(static_cast<unsigned short>(weights >> 16)))));
  }
}

// Ones in each half whose value is not zero; -0.0 is zero, NaN is not.
template <typename T>
__device__ __forceinline__ uint32_t nonzero(uint32_t values) {
  using Two = std::conditional_t<std::is_same_v<T, bfloat16>, __nv_bfloat162, __half2>;
  Two two;
  memcpy(static_cast<void*>(&two), &values, sizeof(two));
  return __hneu2_mask(two, Two(0.f, 0.f));
}

// The lane's stored weights, a Vector for each eight, and where the merged ones go.
template <typename Vector, typename Merged>
struct FastRows {
  const uint8_t* from[2];  // row n + 8 h of the next load
  uint8_t* to[2];          // row n + 8 h of the next store
  int64_t from_step, to_step;  // bytes
  Vector tile[2][2];

  __device__ __forceinline__ FastRows(const MergeProblem& p, int64_t row, int64_t column, int step) {
    const int64_t from_row = p.in_features * int64_t{sizeof(Vector)} / 8, to_row = p.in_features * int64_t{sizeof(Merged)} / 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      from[h] = static_cast<const uint8_t*>(p.weight) + (row + 8 * h) * from_row + column * sizeof(Vector) / 8;
      to[h] = static_cast<uint8_t*>(p.merged) + (row + 8 * h) * to_row + column * sizeof(Merged) / 8;
    }
    from_step = step * from_row;
    to_step = step * to_row;
  }
  __device__ __forceinline__ void load(bool wanted, int h, int c) {
    const Vector* vector = reinterpret_cast<const Vector*>(from[h]) + 4 * c;
    ptx::load_global_if(wanted, tile[h][c], vector);
    if (c == 1) from[h] += from_step;
  }
  __device__ __forceinline__ void write(bool wanted, int h, int c, const Merged& merged) {
    ptx::store_global_if(wanted, reinterpret_cast<Merged*>(to[h]) + 4 * c, merged);
    if (c == 1) to[h] += to_step;
  }
};

// The panel's part of the index in shared memory, and two tables of what four of its bits mean, at 8 bytes for each value.
struct FastIndex : IndexTile {
  const uint8_t* tables;
  const uint32_t* lane_words;  // of the warp's 64 columns in the lane's first row
  uint2 rows[2];               // of row n + 8 h
  int rotate;                  // brings the lane's byte of a word to bit 3

  int step_words;              // from step to step

  __device__ __forceinline__ FastIndex(const MergeProblem& p, int step) : IndexTile(p), step_words(step * p.tile_pitch) {
    tables = ptx::dynamic_shared() + p.tile_at;
    words += kMergeFastTables / 4;
    rotate = (8 * (threadIdx.x % 4) + 29) % 32;
  }
  __device__ __forceinline__ void start(int row, int column) { lane_words = words + row * pitch + column / 32; }
  __device__ __forceinline__ void read() {
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = ptx::load_shared(reinterpret_cast<const uint2*>(lane_words + 8 * h * pitch));
    lane_words += step_words;
  }
  // The lane's eight bits of 32 columns, from bit 3 on; above them are others.
  __device__ __forceinline__ uint32_t bits(int h, int c) const {
    const uint32_t word = c ? rows[h].y : rows[h].x;
    return __funnelshift_r(word, word, rotate);
  }
  // What table `which` says of four bits that begin at bit 3.
  __device__ __forceinline__ uint2 look_up(int which, uint32_t bits) const {
    return ptx::load_shared(reinterpret_cast<const uint2*>(tables + 128 * which + (bits & 0x78)));
  }
  __device__ __forceinline__ void set_table(int which, uint32_t i, const uint2& entry) const {
    ptx::store_shared(reinterpret_cast<uint2*>(const_cast<uint8_t*>(tables)) + 16 * which + i, entry);
  }
};

// Ones in each half that one of two bits keeps.
__device__ __forceinline__ uint32_t halves(uint32_t bits) { return (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u); }
__device__ __forceinline__ uint2 kept_halves(uint32_t bits) { return make_uint2(halves(bits), halves(bits >> 2)); }

// Dense, kept where the weight is not zero.
template <typename T>
struct FastDense : FastRows<uint4, uint4> {
  __device__ __forceinline__ FastDense(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows(p, row, column, step) {}
  __device__ __forceinline__ void stage(const MergeProblem&, int64_t, int64_t, int) const {}
  __device__ __forceinline__ void start(int, int) const {}
  __device__ __forceinline__ void step(const MergeProblem&, int, int) const {}
  __device__ __forceinline__ void store(bool wanted, int h, int c, const float (&sum)[8], float scaling) {
    const uint4& w = tile[h][c];
    write(wanted, h, c, make_uint4(merge_pair<T>(w.x, sum[0], sum[1], scaling) & nonzero<T>(w.x),
                           merge_pair<T>(w.y, sum[2], sum[3], scaling) & nonzero<T>(w.y),
                           merge_pair<T>(w.z, sum[4], sum[5], scaling) & nonzero<T>(w.z),
                           merge_pair<T>(w.w, sum[6], sum[7], scaling) & nonzero<T>(w.w)));
  }
};

// Dense, kept where a mask says so.
template <typename T>
struct FastMasked : FastRows<uint4, uint4>, FastIndex {
  __device__ __forceinline__ FastMasked(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows(p, row, column, step), FastIndex(p, step) {
    if (threadIdx.x < 16) set_table(0, threadIdx.x, kept_halves(threadIdx.x));
  }
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int) const {
    IndexTile::stage(p, row, column);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int, int) { read(); }
  __device__ __forceinline__ void store(bool wanted, int h, int c, const float (&sum)[8], float scaling) {
    const uint4& w = tile[h][c];
    const uint32_t mask = bits(h, c);
    const uint2 low = look_up(0, mask), high = look_up(0, mask >> 4);
    write(wanted, h, c, make_uint4(merge_pair<T>(w.x, sum[0], sum[1], scaling) & low.x, merge_pair<T>(w.y, sum[2], sum[3], scaling) & low.y,
                           merge_pair<T>(w.z, sum[4], sum[5], scaling) & high.x, merge_pair<T>(w.w, sum[6], sum[7], scaling) & high.y));
  }
};

}  // namespace lors::cuda
