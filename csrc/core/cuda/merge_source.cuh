// SPDX-License-Identifier: Apache-2.0
// How the merge (merge.cuh) reads a frozen weight, and where the merged values go. A weight stored in another way (one per
// expert) is one more Source, and one more line in merge.cu; of quantised codes: merge_quantized.cuh. A Source<W, Out> offers
//   Source(p)                           by every thread, once. Shared memory of its own begins at p.tile_at (merge_tile_bytes)
//   stage(p, panel_row, first_column)   by the whole block, for each panel of rows: what `fetch` and `expand` look up in shared
//                                       memory. The kernel has a barrier before and after it
//   fetch(p, at)                        by whole warps, for each step of rows: starts the loads of the weights, which arrive
//                                       while the adapters are multiplied
//   kLate                               `fetch` runs after the adapters instead: the registers do not suffice for both
//   expand(p, at, h, c, values)         the lane's eight weights as float32, and as bits which are kept. Row and columns: Lane
//   requantize(p, at, h, c, kept, values)   optional: the merged values, before they are rounded
// and a Sink<W, Out>
//   store(p, at, source, h, c, values)  the lane's eight merged values, +0 where nothing is kept
#pragma once

#include "merge_problem.cuh"

namespace lors::cuda {

// Where a lane is in a step: it owns eight columns (kSplitColumns) of row n(h), h = 0 and 1, in each of the two times 32
// columns from column + 32 c on, c = 0 and 1.
struct Lane {
  int64_t panel_row, column;  // of the weight
  int row, word;              // of the panel in shared memory: row n(0), and the 32 columns from `column` on
  int q;                      // which of the four lanes that share the rows
  __device__ __forceinline__ int64_t n(int h) const { return panel_row + row + 8 * h; }
};

// Which eight of 32 columns the lane q of a quad owns: 8 q .. 8 q + 7, one 16-byte access of a 16-bit type; or, split,
// 4 q .. 4 q + 3 and 16 + 4 q .. 16 + 4 q + 3, two 16-byte accesses of float32 that each fill whole sectors.
template <typename W, typename Out>
constexpr bool kSplitColumns = std::is_same_v<W, float> || std::is_same_v<Out, float>;

template <typename T, bool kSplit>
__device__ __forceinline__ Eight<T> load_columns(const T* row, int64_t column, int64_t columns, bool vectors) {
  if constexpr (!kSplit) return load_eight<T, true>(row, column, columns, vectors);
  Eight<T> eight{};
  if (vectors) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* from = row + column + 16 * half;
      if (column + 16 * half >= columns) break;
      if constexpr (std::is_same_v<T, float>) {
        eight.vector[half] = ptx::load_global_once(reinterpret_cast<const uint4*>(from));
      } else {
        const uint2 v = ptx::load_global(reinterpret_cast<const uint2*>(from));
        (half ? eight.vector[0].z : eight.vector[0].x) = v.x;
        (half ? eight.vector[0].w : eight.vector[0].y) = v.y;
      }
    }
    return eight;
  }
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t k = column + i % 4 + i / 4 * 16;
    values[i] = k < columns ? to_float(ptx::load_global(row + k)) : 0.f;
  }
  eight.set(values);
  return eight;
}

template <typename T, bool kSplit>
__device__ __forceinline__ void store_columns(T* row, int64_t column, int64_t columns, bool vectors, const Eight<T>& eight) {
  if constexpr (!kSplit) return store_eight(row, column, columns, vectors, eight);
  if (vectors) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = row + column + 16 * half;
      if (column + 16 * half >= columns) break;
      if constexpr (std::is_same_v<T, float>)
        ptx::store_global(reinterpret_cast<uint4*>(to), eight.vector[half]);
      else
        ptx::store_global(reinterpret_cast<uint2*>(to), half ? make_uint2(eight.vector[0].z, eight.vector[0].w)
                                                             : make_uint2(eight.vector[0].x, eight.vector[0].y));
    }
    return;
  }
  float values[8];
  eight.get(values);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t k = column + i % 4 + i / 4 * 16;
    if (k < columns) ptx::store_global(row + k, from_float<T>(values[i]));
  }
}

// Where in a row the lane's eight columns begin.
template <bool kSplit>
__device__ __forceinline__ int64_t lane_column(const Lane& at, int c) {
  return at.column + 32 * c + at.q * (kSplit ? 4 : 8);
}

template <typename W, typename Out>
struct DenseSource {
  static constexpr bool kSplit = kSplitColumns<W, Out>;
  static constexpr bool kLate = std::is_same_v<W, float> && !std::is_same_v<Out, float>;
  Eight<W> tile[2][2];

  explicit __device__ __forceinline__ DenseSource(const MergeProblem&) {}
  __device__ __forceinline__ void stage(const MergeProblem&, int64_t, int64_t) const {}
  __device__ __forceinline__ void fetch(const MergeProblem& p, const Lane& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        tile[h][c] =
            load_columns<W, kSplit>(static_cast<const W*>(p.weight) + at.n(h) * p.in_features, lane_column<kSplit>(at, c),
                                    at.n(h) < p.out_features ? p.in_features : 0, p.weight_vectors);
  }
  __device__ __forceinline__ uint32_t expand(const MergeProblem& p, const Lane& at, int h, int c, float (&values)[8]) const {
    tile[h][c].get(values);
    uint32_t kept = 0;
    if (p.index == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) kept |= uint32_t(values[i] != 0.f) << i;
      return kept;
    }
    if (lane_column<kSplit>(at, c) < p.in_features)
      kept = ptx::load_global(reinterpret_cast<const uint32_t*>(p.index + at.n(h) * p.index_pitch) + (at.column + 32 * c) / 32);
    return kSplit ? (kept >> (4 * at.q) & 0xf) | (kept >> (16 + 4 * at.q) & 0xf) << 4 : kept >> (8 * at.q);
  }
};

// The values [slot, slot + 4) of a row of `slots`; zeros beyond its end. `slot` is a multiple of 4.
template <typename T>
__device__ __forceinline__ void load_four(float (&values)[4], const T* row, int64_t slot, int64_t slots, bool vectors) {
  if (vectors) {
    uint4 v{};
    if (slot < slots) {
      if constexpr (sizeof(T) == 4) {
        v = ptx::load_global_once(reinterpret_cast<const uint4*>(row + slot));
      } else {
        const uint2 half = ptx::load_global(reinterpret_cast<const uint2*>(row + slot));
        v.x = half.x, v.y = half.y;
      }
    }
    float eight[8];
    Eight<T> whole{};
    whole.vector[0] = v;
    whole.get(eight);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = eight[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = slot + i < slots ? to_float(ptx::load_global(row + slot + i)) : 0.f;
}

template <typename W, typename Out>
struct Sparse24Source : IndexTile {
  static constexpr bool kSplit = kSplitColumns<W, Out>, kLate = false;
  // The lane's eight columns are two groups of four: `low` and `high`, numbers in the 32 columns.
  float slots[2][2][4];  // of group low, then high
  uint32_t codes[2][2];  // of both, high << 4

  using IndexTile::IndexTile;
  __device__ __forceinline__ void fetch(const MergeProblem& p, const Lane& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int low = kSplit ? at.q : 2 * at.q, high = kSplit ? 4 + at.q : 2 * at.q + 1;
        const uint32_t word = ptx::load_shared(words + (at.row + 8 * h) * pitch + at.word + c);
        codes[h][c] = (word >> (4 * low) & 15) | (word >> (4 * high) & 15) << 4;
        const W* const row = static_cast<const W*>(p.weight) + at.n(h) * (p.in_features / 2);
        const int64_t end = at.n(h) < p.out_features ? p.in_features / 2 : 0, first = (at.column + 32 * c) / 2;
        if constexpr (!kSplit) {
          load_four(slots[h][c], row, first + 4 * at.q, end, p.weight_vectors);
        } else {
          load_two(slots[h][c][0], slots[h][c][1], row, first + 2 * low, end, p.weight_vectors);
          load_two(slots[h][c][2], slots[h][c][3], row, first + 2 * high, end, p.weight_vectors);
        }
      }
  }
  // values: zero where nothing is kept.
  __device__ __forceinline__ uint32_t expand(const MergeProblem&, const Lane&, int h, int c, float (&values)[8]) const {
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t position[2];
      slots_of(codes[h][c] >> (4 * half), position);
      kept |= (((1u << position[0]) | (1u << position[1])) & 15) << (4 * half);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        values[4 * half + i] = position[0] == i ? slots[h][c][2 * half] : position[1] == i ? slots[h][c][2 * half + 1] : 0.f;
    }
    return kept;
  }

 private:
  static __device__ __forceinline__ void load_two(float& first, float& second, const W* row, int64_t slot, int64_t end,
                                                  bool vectors) {
    first = second = 0.f;
    if (slot >= end) return;
    if (!vectors) {
      first = to_float(ptx::load_global(row + slot)), second = to_float(ptx::load_global(row + slot + 1));
      return;
    }
    Eight<W> whole{};
    if constexpr (sizeof(W) == 4) {
      const uint2 v = ptx::load_global(reinterpret_cast<const uint2*>(row + slot));
      whole.vector[0].x = v.x, whole.vector[0].y = v.y;
    } else {
      whole.vector[0].x = ptx::load_global(reinterpret_cast<const uint32_t*>(row + slot));
    }
    float values[8];
    whole.get(values);
    first = values[0], second = values[1];
  }
};

// The index of a bitmap's panel, and where the values of each of its words are.
struct BitmapTile : IndexTile {
  uint32_t* before;  // [panel_rows, pitch]: the values of the row before each word
  int64_t* begin;    // [panel_rows]: where the row begins in the values

  explicit __device__ __forceinline__ BitmapTile(const MergeProblem& p)
      : IndexTile(p), before(words + p.panel_rows * pitch), begin(reinterpret_cast<int64_t*>(before + p.panel_rows * pitch)) {}

  __device__ __forceinline__ void stage(const MergeProblem& p, int64_t panel_row, int64_t first_column) const {
    IndexTile::stage(p, panel_row, first_column);
    __syncthreads();
    for (int i = threadIdx.x; i < p.panel_rows; i += blockDim.x) {
      const int64_t n = panel_row + i;
      if (n >= p.out_features) break;
      count_before(before, i, ptx::load_global(p.before + n * p.column_blocks + first_column / blockDim.x));
      ptx::store_shared(begin + i, ptx::load_global(p.row_offsets + n));
    }
  }
};

template <typename W, typename Out>
struct BitmapSource : BitmapTile {
  static constexpr bool kSplit = kSplitColumns<W, Out>, kLate = false;
  W* fetched;  // [16, kMergeValuesPitch]: the values of the warp's 16 rows x 64 columns

  explicit __device__ __forceinline__ BitmapSource(const MergeProblem& p)
      : BitmapTile(p), fetched(reinterpret_cast<W*>(begin + p.panel_rows) + threadIdx.x / kWarp * 16 * kMergeValuesPitch) {}

  // Row by row: where values are depends on every bit before them, and rows that follow each other are neighbours in memory.
  __device__ __forceinline__ void fetch(const MergeProblem& p, const Lane& at) const {
    const int lane = threadIdx.x % kWarp, row = at.row - lane / 4;
    __syncwarp();  // the last step's have been read
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      if (at.panel_row + row + i >= p.out_features) break;
      const int word = (row + i) * pitch + at.word;
      const int count = __popc(ptx::load_shared(words + word)) + __popc(ptx::load_shared(words + word + 1));
      const W* const from =
          static_cast<const W*>(p.weight) + ptx::load_shared(begin + row + i) + ptx::load_shared(before + word);
      // All lanes or none, so that they stay together; those beyond the end fetch the last value once more.
#pragma unroll
      for (int part = 0; part < 64; part += kWarp)
        if (part < count)
          ptx::store_shared(fetched + i * kMergeValuesPitch + part + lane,
                            ptx::load_global(from + (part + lane < count ? part + lane : count - 1)));
    }
    __syncwarp();
  }
  __device__ __forceinline__ uint32_t expand(const MergeProblem&, const Lane& at, int h, int c, float (&values)[8]) const {
    const uint32_t* const index = words + (at.row + 8 * h) * pitch + at.word;
    const uint32_t word[2] = {ptx::load_shared(index), ptx::load_shared(index + 1)};
    const W* const row = fetched + (threadIdx.x % kWarp / 4 + 8 * h) * kMergeValuesPitch;
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = 4 * (kSplit ? at.q + 4 * half : 2 * at.q + half);  // of 32 columns
      const uint32_t four = word[c] >> first & 15;
      const W* value = row + (c ? __popc(word[0]) : 0) + __popc(word[c] & ((1u << first) - 1));
      kept |= four << (4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool has = four >> i & 1;
        values[4 * half + i] = has ? to_float(ptx::load_shared(value)) : 0.f;
        value += has;
      }
    }
    return kept;
  }
};

template <typename W, typename Out>
struct DenseSink {
  template <typename Source>
  static __device__ __forceinline__ void store(const MergeProblem& p, const Lane& at, const Source&, int h, int c,
                                               const float (&values)[8]) {
    Eight<Out> out;
    out.set(values);
    store_columns<Out, kSplitColumns<W, Out>>(static_cast<Out*>(p.merged) + at.n(h) * p.in_features,
                                              lane_column<kSplitColumns<W, Out>>(at, c), p.in_features, p.merged_vectors, out);
  }
};

// values[position], of four in registers; +0 for position 4.
__device__ __forceinline__ float pick(const float (&values)[8], int group, uint32_t position) {
  float v = 0.f;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) v = position == i ? values[4 * group + i] : v;
  return v;
}

template <typename T>
__device__ __forceinline__ void store_four(T* row, int64_t slot, int64_t slots, bool vectors, const float (&values)[4]) {
  if (vectors) {
    if (slot >= slots) return;
    const float eight[8] = {values[0], values[1], values[2], values[3]};
    Eight<T> whole;
    whole.set(eight);
    const uint4 v = whole.vector[0];
    if constexpr (sizeof(T) == 4)
      ptx::store_global(reinterpret_cast<uint4*>(row + slot), v);
    else
      ptx::store_global(reinterpret_cast<uint2*>(row + slot), make_uint2(v.x, v.y));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (slot + i < slots) ptx::store_global(row + slot + i, from_float<T>(values[i]));
}

// Into the slots that the weight's own codes name, in the weight's own type: W is Out.
template <typename W, typename Out>
struct Sparse24Sink {
  static __device__ __forceinline__ void store(const MergeProblem& p, const Lane& at, const Sparse24Source<W, Out>& source,
                                               int h, int c, const float (&values)[8]) {
    float merged[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t position[2];
      slots_of(source.codes[h][c] >> (4 * half), position);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) merged[2 * half + slot] = pick(values, half, position[slot]);
    }
    const int64_t end = p.in_features / 2, first = (at.column + 32 * c) / 2;
    W* const row = static_cast<W*>(p.merged) + at.n(h) * end;
    if constexpr (!kSplitColumns<W, Out>) {
      store_four(row, first + 4 * at.q, end, p.merged_vectors, merged);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = first + 2 * (at.q + 4 * half);
        if (slot < end) store_two(row + slot, p.merged_vectors, merged[2 * half], merged[2 * half + 1]);
      }
    }
  }

 private:
  // Split columns and a result in the weight's own type mean float32.
  static __device__ __forceinline__ void store_two(W* to, bool vectors, float first, float second) {
    if (vectors) {
      ptx::store_global(reinterpret_cast<uint2*>(to), make_uint2(__float_as_uint(first), __float_as_uint(second)));
    } else {
      ptx::store_global(to, from_float<W>(first));
      ptx::store_global(to + 1, from_float<W>(second));
    }
  }
};

}  // namespace lors::cuda
