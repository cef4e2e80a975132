// SPDX-License-Identifier: Apache-2.0
// How merge_fast.cuh reads each layout and writes the result. A lane owns eight columns in each of the two times 32 columns of
// its warp (c = 0, 1) of the rows n and n + 8 (h = 0, 1), and moves down by `step` rows. A Source<T> offers
//   Source(p, columns, row, column, step)       row, column: the lane's first
//   load(number, limit, h, c)                   where number > limit, starts the loads of the next eight weights below those
//                                               loaded last; c = 0 before c = 1
//   stage(p, row, column, rows)                 by the whole block, for the panel of rows from `row` on, of which `rows` exist
//   start(row, column, rows)                    after a barrier: the lane's first row of the panel of `rows`, the warp's column
//   step(p, at, rows)                           by the whole block, before the step at row `at` of the panel, of `rows`
//   store(number, limit, h, c, sum, scaling)    merges and, where number > limit, writes the eight last loaded; `sum` is their
//                                               lora_B lora_A
#pragma once

#include "merge_fast_config.h"
#include "merge_problem.cuh"

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

// The same, and the lane's stored weights, a Vector for each eight.
template <typename Vector, typename Merged>
struct FastRows : FastResult<Merged> {
  const uint8_t* from[2];  // row n + 8 h of the next load
  int64_t from_step;
  Vector tile[2][2];

  __device__ __forceinline__ FastRows(const MergeProblem& p, int64_t row, int64_t column, int step)
      : FastResult<Merged>(p, row, column, step) {
    const int64_t pitch = p.in_features * int64_t{sizeof(Vector)} / 8;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      from[h] = static_cast<const uint8_t*>(p.weight) + (row + 8 * h) * pitch + column * int64_t{sizeof(Vector)} / 8;
    from_step = step * pitch;
  }
  __device__ __forceinline__ void load(int number, int limit, int h, int c) {
    ptx::load_global_if(number, limit, tile[h][c], reinterpret_cast<const Vector*>(from[h]) + 4 * c);
    if (c == 1) from[h] += from_step;
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
  __device__ __forceinline__ void start(int row, int column, int = 0) { lane_words = words + row * pitch + column / 32; }
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
  __device__ __forceinline__ void start(int, int, int) const {}
  __device__ __forceinline__ void step(const MergeProblem&, int, int) const {}
  __device__ __forceinline__ void store(int number, int limit, int h, int c, const float (&sum)[8], float scaling) {
    const uint4& w = tile[h][c];
    write(number, limit, h, c,
          make_uint4(merge_pair<T>(w.x, sum[0], sum[1], scaling) & nonzero<T>(w.x),
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
  __device__ __forceinline__ void store(int number, int limit, int h, int c, const float (&sum)[8], float scaling) {
    const uint4& w = tile[h][c];
    const uint32_t mask = bits(h, c);
    const uint2 low = look_up(0, mask), high = look_up(0, mask >> 4);
    write(
        number, limit, h, c,
        make_uint4(merge_pair<T>(w.x, sum[0], sum[1], scaling) & low.x, merge_pair<T>(w.y, sum[2], sum[3], scaling) & low.y,
                   merge_pair<T>(w.z, sum[4], sum[5], scaling) & high.x, merge_pair<T>(w.w, sum[6], sum[7], scaling) & high.y));
  }
};

// From 2:4 to dense (Merged = uint4) or to 2:4 values in the same slots (uint2).
template <typename T, typename Merged>
struct FastGroups : FastRows<uint2, Merged>, FastIndex {
  static constexpr bool kToDense = sizeof(Merged) == 16;

  __device__ __forceinline__ FastGroups(const MergeProblem& p, int, int64_t row, int64_t column, int step)
      : FastRows<uint2, Merged>(p, row, column, step), FastIndex(p, step) {
    if (threadIdx.x < 16) set_table(0, threadIdx.x, entry(threadIdx.x));
  }
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int) const {
    IndexTile::stage(p, row, column);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int, int) { read(); }
  __device__ __forceinline__ void store(int number, int limit, int h, int c, const float (&sum)[8], float scaling) {
    const uint2& slots = this->tile[h][c];
    const uint32_t code = bits(h, c);
    const uint32_t low = merged_slots(slots.x, code, sum, scaling), high = merged_slots(slots.y, code >> 4, sum + 4, scaling);
    const uint2 at = look_up(0, code), at_high = look_up(0, code >> 4);
    if constexpr (kToDense)
      this->write(number, limit, h, c,
                  make_uint4(ptx::pick_bytes(low, 0, at.x), ptx::pick_bytes(low, 0, at.y), ptx::pick_bytes(high, 0, at_high.x),
                             ptx::pick_bytes(high, 0, at_high.y)));
    else
      this->write(number, limit, h, c, make_uint2(low & at.x, high & at_high.x));
  }

 private:
  // Of a code: to dense, how ptx::pick_bytes(slots, 0) fills columns 0 and 1, and 2 and 3; else ones in the slots that hold a
  // weight.
  static __device__ __forceinline__ uint2 entry(uint32_t code) {
    uint32_t position[2];
    slots_of(code, position);
    if constexpr (!kToDense) return make_uint2((position[0] < 4 ? 0xffffu : 0u) | (position[1] < 4 ? 0xffff0000u : 0u), 0);
    uint32_t selectors = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) selectors |= (position[0] == i ? 0x10u : position[1] == i ? 0x32u : 0x44u) << (8 * i);
    return make_uint2(selectors & 0xffff, selectors >> 16);
  }
  // Both slots of a group, of whose columns `sum` is the product; the code begins at bit 3. A slot without a weight gets
  // anything.
  static __device__ __forceinline__ uint32_t merged_slots(uint32_t slots, uint32_t code, const float* sum, float scaling) {
    const float first = code & 16 ? sum[2] : code & 8 ? sum[1] : sum[0];
    const float second = code & 64 ? (code & 32 ? sum[3] : sum[2]) : sum[1];
    return merge_pair<T>(slots, first, second, scaling);
  }
};
template <typename T>
struct FastSparse24 : FastGroups<T, uint4> {
  using FastGroups<T, uint4>::FastGroups;
};
template <typename T>
struct FastSparse24Values : FastGroups<T, uint2> {
  using FastGroups<T, uint2>::FastGroups;
};

// Bitmap. The values of a block's rows come into shared memory in whole sectors, one step ahead.
template <typename T>
struct FastBitmap : FastResult<uint4>, FastIndex {
  const T* values;
  int64_t count;     // of all values
  uint32_t* before;  // [panel_rows, pitch]: where the values of a word begin in the row in shared memory; behind the last word,
                     // the end
  int64_t* begin;    // [panel_rows]: where the row in shared memory begins in `values`
  uint8_t* fetched;  // [2, step_rows, values_pitch] of T
  int step_rows, values_pitch;
  int lane_row, lane_word;
  const uint8_t* lane_values[2];  // the row n + 8 h
  uint2 starts[2];

  __device__ __forceinline__ FastBitmap(const MergeProblem& p, int columns, int64_t row, int64_t column, int step)
      : FastResult(p, row, column, step), FastIndex(p, step), values(static_cast<const T*>(p.weight)), step_rows(step) {
    count = ptx::load_global(p.row_offsets + p.out_features);
    before = words + p.panel_rows * pitch;
    begin = reinterpret_cast<int64_t*>(before + p.panel_rows * pitch);
    fetched = reinterpret_cast<uint8_t*>(begin + p.panel_rows);
    values_pitch = columns + kMergeFastValuesPad;
    // Words behind a row's last value are read too, and what they hold is dropped.
    for (int i = threadIdx.x; i < int{sizeof(T)} * values_pitch * step_rows / 8; i += kMergeFastThreads)
      ptx::store_shared(reinterpret_cast<uint4*>(fetched) + i, uint4{});
    if (threadIdx.x < 16) {
      set_table(0, threadIdx.x, kept_halves(threadIdx.x));
      set_table(1, threadIdx.x, placed(threadIdx.x));
    }
  }
  __device__ __forceinline__ void load(int, int, int, int) const {}
  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t row, int64_t column, int rows) const {
    IndexTile::stage(p, row, column);
    __syncthreads();
    const int quads = pitch / 4 - 1;
    for (int i = threadIdx.x; i < p.panel_rows; i += kMergeFastThreads) {
      int64_t first = 0;  // where there is no such row: of its words, no bit is set
      if (i < rows)
        first = ptx::load_global(p.row_offsets + row + i) +
                ptx::load_global(p.before + (row + i) * p.column_blocks + column / (128 * quads));
      uint32_t at = static_cast<uint32_t>(first % kSector);
      ptx::store_shared(begin + i, first - at);
      for (int quad = 0; quad < quads; ++quad) {
        const uint4 v = ptx::load_shared(reinterpret_cast<const uint4*>(words + i * pitch) + quad);
        const uint4 starts =
            make_uint4(at, at + __popc(v.x), at + __popc(v.x) + __popc(v.y), at + __popc(v.x) + __popc(v.y) + __popc(v.z));
        at = starts.w + __popc(v.w);
        ptx::store_shared(reinterpret_cast<uint4*>(before + i * pitch) + quad, starts);
      }
      ptx::store_shared(before + i * pitch + 4 * quads, at);
    }
  }
  __device__ __forceinline__ void start(int row, int column, int rows) {
    FastIndex::start(row, column);
    lane_row = row;
    lane_word = column / 32;
    copy(0, rows, 0);
  }
  __device__ __forceinline__ void step(const MergeProblem&, int at, int rows) {
    const int buffer = at / step_rows % 2;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's values are there, and the last one's have been read
    copy(at + step_rows, rows, 1 - buffer);
    read();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      starts[h] = ptx::load_shared(reinterpret_cast<const uint2*>(before + (at + lane_row + 8 * h) * pitch + lane_word));
      lane_values[h] = fetched + int64_t{sizeof(T)} * values_pitch * (buffer * step_rows + lane_row + 8 * h);
    }
  }
  __device__ __forceinline__ void store(int number, int limit, int h, int c, const float (&sum)[8], float scaling) {
    const uint32_t mask = bits(h, c), word = c ? rows[h].y : rows[h].x;
    const uint32_t first = (c ? starts[h].y : starts[h].x) + __popc(word & ((1u << 8 * (threadIdx.x % 4)) - 1));
    const uint2 low = merged_four(h, first, mask, sum, scaling);
    const uint2 high = merged_four(h, first + __popc(mask & 0x78), mask >> 4, sum + 4, scaling);
    write(number, limit, h, c, make_uint4(low.x, low.y, high.x, high.y));
  }

 private:
  static constexpr int kSector = 32 / sizeof(T);

  // Starts the copies of the rows at..at + step_rows of the panel.
  __device__ __forceinline__ void copy(int at, int rows, int buffer) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int i = threadIdx.x / kWarp; i < step_rows && at + i < rows; i += kMergeFastWarps) {
      const int64_t first = ptx::load_shared(begin + at + i);
      const int end = static_cast<int>(ptx::load_shared(before + (at + i) * pitch + pitch - 4));
      const int left =
          count - first < end + 8 ? static_cast<int>(count - first) : end + 8;  // nothing is read behind the values
      const uint32_t to = ptx::shared_address(fetched) + sizeof(T) * values_pitch * (buffer * step_rows + i);
#pragma unroll 1
      for (int e = 8 * lane; e < end; e += 8 * kWarp)
        ptx::cp_async_16(to + sizeof(T) * e, values + first + e, left - e < 8 ? static_cast<int>(sizeof(T)) * (left - e) : 16);
    }
    ptx::cp_async_commit();
  }
  // How ptx::pick_bytes fills columns 0 and 1, and 2 and 3, from the values of those that four bits keep.
  static __device__ __forceinline__ uint2 placed(uint32_t bits) {
    uint32_t selectors = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t value = __popc(bits & ((1u << i) - 1));
      selectors |= (bits >> i & 1 ? 0x10u + 0x22u * value : 0u) << (8 * i);
    }
    return make_uint2(selectors & 0xffff, selectors >> 16);
  }
  // Four columns whose bits begin at bit 3 and whose values begin at element `first` of the row in shared memory.
  __device__ __forceinline__ uint2 merged_four(int h, uint32_t first, uint32_t bits, const float* sum, float scaling) const {
    const uint32_t* const at = reinterpret_cast<const uint32_t*>(lane_values[h]) + first / 2;
    const uint32_t v[3] = {ptx::load_shared(at), ptx::load_shared(at + 1), ptx::load_shared(at + 2)};
    const uint32_t shift = 16 * first, x = __funnelshift_r(v[0], v[1], shift),
                   y = __funnelshift_r(v[1], v[2], shift);  // modulo 32
    const uint2 kept = look_up(0, bits), places = look_up(1, bits);
    return make_uint2(merge_pair<T>(ptx::pick_bytes(x, y, places.x), sum[0], sum[1], scaling) & kept.x,
                      merge_pair<T>(ptx::pick_bytes(x, y, places.y), sum[2], sum[3], scaling) & kept.y);
  }
};

}  // namespace lors::cuda
