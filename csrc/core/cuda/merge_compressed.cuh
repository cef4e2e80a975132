// SPDX-License-Identifier: Apache-2.0
// merged = weight + scaling * mask o (lora_B lora_A) for a weight of layout 2:4 or bitmap (lors/sparse24.h, lors/types.h),
// into a dense matrix, or, for 2:4, into its own slots [N, K/2]. One pass, as merge.cuh, and the same sums: the same bits come
// out. Launched by merge_compressed.cu.
#pragma once

#include "merge_tile.cuh"
#include "sparse24_slots.cuh"

namespace lors::cuda {

constexpr int kBeforeThreads = 256;

struct CompressedProblem {
  MergeProblem merge;    // `weight`: the values; `mask`: a bitmap's bits; `weight_vectors`, `merged_vectors`: of the values
  const uint8_t* index;  // 2:4: metadata [N, index_pitch]; bitmap: the bits as bytes
  int64_t index_pitch;   // bytes of a row of `index`
  bool index_vectors;    // every row of `index` is aligned to 16 bytes
  const int64_t* row_offsets;  // bitmap: [N + 1]
  const uint32_t* before;      // bitmap: [N, column_blocks], the values of the row before each block's columns
  int tile_at, tile_pitch;     // of the tile: bytes from the start of shared memory, and merge_tile_pitch
};

// The block's part of `index` in shared memory, a word for each 32 columns, and what a bitmap needs beside it.
template <bool kBitmap>
struct IndexTile {
  int pitch, rows;
  uint32_t* words;   // [rows, pitch]
  uint32_t* before;  // [rows, pitch]: the values of the row before each word
  int64_t* begin;    // [rows]: where the row begins in the values

  explicit __device__ __forceinline__ IndexTile(const CompressedProblem& p)
      : pitch(p.tile_pitch),
        rows(p.merge.panel_rows),
        words(reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + p.tile_at)),
        before(words + rows * pitch),
        begin(reinterpret_cast<int64_t*>(before + rows * pitch)) {}

  // One panel of rows, from first_row on. All threads; ends with the tile complete.
  __device__ __forceinline__ void stage(const CompressedProblem& p, int64_t first_row, int64_t first_column,
                                        int columns) const {
    const int quads = columns / 128;  // of words in a row
    for (int task = threadIdx.x; task < rows * quads; task += blockDim.x) {
      // Eight neighbouring lanes take eight rows, which lie in different banks.
      const int i = task / (8 * quads) * 8 + task % 8, quad = task / 8 % quads;
      const int64_t n = first_row + i, byte = first_column / 8 + 16 * quad;
      const uint8_t* const from = p.index + n * p.index_pitch + byte;
      const int64_t left = n < p.merge.out_features ? p.index_pitch - byte : 0;
      uint32_t word[4] = {};
      if (p.index_vectors && left >= 16) {
        const uint4 v = ptx::load_global_once(reinterpret_cast<const uint4*>(from));
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
      } else {
#pragma unroll
        for (int b = 0; b < 16; ++b)
          if (b < left) word[b / 4] |= static_cast<uint32_t>(ptx::load_global(from + b)) << (8 * (b % 4));
      }
      ptx::store_shared(reinterpret_cast<uint4*>(words + i * pitch + 4 * quad), make_uint4(word[0], word[1], word[2], word[3]));
    }
    __syncthreads();
    if constexpr (kBitmap) {
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int64_t n = first_row + i;
        if (n >= p.merge.out_features) break;
        uint32_t count = ptx::load_global(p.before + n * p.merge.column_blocks + first_column / columns);
        for (int quad = 0; quad < quads; ++quad) {
          const uint4 v = ptx::load_shared(reinterpret_cast<const uint4*>(words + i * pitch) + quad);
          uint4 sums = make_uint4(count, count + __popc(v.x), 0, 0);
          sums.z = sums.y + __popc(v.y);
          sums.w = sums.z + __popc(v.z);
          count = sums.w + __popc(v.w);
          ptx::store_shared(reinterpret_cast<uint4*>(before + i * pitch) + quad, sums);
        }
        ptx::store_shared(begin + i, ptx::load_global(p.row_offsets + n));
      }
      __syncthreads();
    }
  }
};

// Eight columns of one row as a lane owns them (merge.cuh: kSplitColumns): their stored values, and which are kept. The lane's
// two groups of four are `low` and `high`, numbers in the 32 columns.
template <typename W, bool kSplit>
struct CompressedEight {
  float slots[4];  // 2:4: of group low, then high
  uint32_t codes;  // 2:4: of both, high << 4

  __device__ __forceinline__ void load(const CompressedProblem& p, int64_t n, int64_t group, int q, uint32_t word) {
    const int low = kSplit ? q : 2 * q, high = kSplit ? 4 + q : 2 * q + 1;
    codes = (word >> (4 * low) & 15) | (word >> (4 * high) & 15) << 4;
    const int64_t K = p.merge.in_features;
    const W* const row = static_cast<const W*>(p.merge.weight) + n * (K / 2);
    const int64_t end = n < p.merge.out_features ? K / 2 : 0;
    if constexpr (!kSplit) {
      load_four(slots, row, group / 2 + 4 * q, end, p.merge.weight_vectors);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = group / 2 + 2 * (half ? high : low);
        float two[2] = {};
        if (slot < end) load_two(two, row + slot, p.merge.weight_vectors);
        slots[2 * half] = two[0], slots[2 * half + 1] = two[1];
      }
    }
  }
  // values: zero where nothing is kept.
  __device__ __forceinline__ uint32_t expand(float (&values)[8]) const {
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t position[2];
      slots_of(codes >> (4 * half), position);
      kept |= (((1u << position[0]) | (1u << position[1])) & 15) << (4 * half);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        values[4 * half + i] = position[0] == i ? slots[2 * half] : position[1] == i ? slots[2 * half + 1] : 0.f;
    }
    return kept;
  }
  // The merged values' slots, where load found the weight's.
  __device__ __forceinline__ void store(const CompressedProblem& p, int64_t n, int64_t group, int q,
                                        const float (&values)[8]) const {
    float merged[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t position[2];
      slots_of(codes >> (4 * half), position);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) merged[2 * half + slot] = pick(values, half, position[slot]);
    }
    const int64_t end = p.merge.in_features / 2;
    W* const row = static_cast<W*>(p.merge.merged) + n * end;
    if constexpr (!kSplit) {
      store_four(row, group / 2 + 4 * q, end, p.merge.merged_vectors, merged);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = group / 2 + 2 * (q + 4 * half);
        if (slot < end) store_two(row + slot, p.merge.merged_vectors, merged[2 * half], merged[2 * half + 1]);
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
  static __device__ __forceinline__ void load_two(float (&two)[2], const W* from, bool vectors) {
    if (!vectors) {
      two[0] = to_float(ptx::load_global(from)), two[1] = to_float(ptx::load_global(from + 1));
      return;
    }
    Eight<W> whole{};
    if constexpr (sizeof(W) == 4) {
      const uint2 v = ptx::load_global(reinterpret_cast<const uint2*>(from));
      whole.vector[0].x = v.x, whole.vector[0].y = v.y;
    } else {
      whole.vector[0].x = ptx::load_global(reinterpret_cast<const uint32_t*>(from));
    }
    float values[8];
    whole.get(values);
    two[0] = values[0], two[1] = values[1];
  }
};

// A bitmap's values of the warp's 16 rows x 64 columns, fetched row by row: where they stand depends on every bit before them,
// and in memory the rows are neighbours' neighbours.
template <typename W>
struct WarpValues {
  W* values;  // [16, kMergeValuesPitch]

  // `row`, `word`: of the tile, the warp's first. Ends with the values there for the whole warp.
  __device__ __forceinline__ void fetch(const CompressedProblem& p, const IndexTile<true>& tile, int64_t first_row, int row,
                                        int word) const {
    const int lane = threadIdx.x % kWarp;
    __syncwarp();  // the last step's have been read
#pragma unroll 4
    for (int i = 0; i < 16; ++i) {
      if (first_row + row + i >= p.merge.out_features) break;
      const int at = (row + i) * tile.pitch + word;
      const uint32_t before = ptx::load_shared(tile.before + at);
      const int count = __popc(ptx::load_shared(tile.words + at)) + __popc(ptx::load_shared(tile.words + at + 1));
      const W* const from = static_cast<const W*>(p.merge.weight) + ptx::load_shared(tile.begin + row + i) + before;
      // All lanes or none, so that they stay together; those beyond the end fetch the last value once more.
#pragma unroll
      for (int part = 0; part < 64; part += kWarp)
        if (part < count)
          ptx::store_shared(values + i * kMergeValuesPitch + part + lane,
                            ptx::load_global(from + (part + lane < count ? part + lane : count - 1)));
    }
    __syncwarp();
  }
};

// Eight columns of a row from its fetched values: their values, and which are kept. `words`: the row's two words of 32 columns.
template <typename W, bool kSplit>
__device__ __forceinline__ uint32_t expand_bitmap(float (&values)[8], const W* row, int q, const uint32_t (&words)[2], int c) {
  uint32_t kept = 0;
  const uint32_t word = words[c];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = 4 * (kSplit ? q + 4 * half : 2 * q + half);  // of 32 columns
    const uint32_t four = word >> first & 15;
    const W* value = row + (c ? __popc(words[0]) : 0) + __popc(word & ((1u << first) - 1));
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

// kBitmap: else 2:4. kValues: the result is 2:4 values.
template <typename W, typename Out, bool kBitmap, bool kValues>
__global__ void __launch_bounds__(512, 1) merge_compressed_kernel(const CompressedProblem problem) {
  const MergeProblem& p = problem.merge;
  const int columns = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int planes_A = split_terms(p.lora_A.dtype), planes_B = split_terms(p.lora_B.dtype);
  const int64_t first_row = blockIdx.x / p.column_blocks * p.rows, first_column = blockIdx.x % p.column_blocks * columns;
  const int warp_row = warp % 2 * 16, warp_column = warp / 2 * 64, q = lane % 4;
  constexpr bool kSplit = kSplitColumns<W, Out>;
  const int64_t group = first_column + warp_column;
  const int64_t left = p.out_features - first_row;
  const int rows = left < p.rows ? static_cast<int>(left) : p.rows;
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* const lora_B = lora_A + planes_A * p.chunk * (columns + kMergePad);
  const bool resident = p.chunk >= p.lora_A.rows;
  const IndexTile<kBitmap> tile(problem);
  const WarpValues<W> fetched{reinterpret_cast<W*>(tile.begin + tile.rows) + warp * 16 * kMergeValuesPitch};  // a bitmap's

  if (resident) stage_lora_A<kSplit>(lora_A, p.lora_A, 0, first_column, p.chunk, columns);
  for (int step = 0; step < rows; step += kMergeStepRows) {
    const int panel_step = step & (p.panel_rows - 1);
    const int64_t panel_row = first_row + step - panel_step;  // where the panel begins
    if (panel_step == 0) {
      if (step > 0) __syncthreads();  // the last panel has been read
      if (resident) stage_lora_B(lora_B, p.lora_B, panel_row, 0, p.panel_rows, p.chunk);
      tile.stage(problem, panel_row, first_column, columns);
    }
    const int row = panel_step + warp_row + lane / 4;  // of the panel's
    CompressedEight<W, kSplit> stored[2][2];           // 2:4; on its way while the adapters are multiplied
    if constexpr (!kBitmap) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t word = ptx::load_shared(tile.words + (row + 8 * h) * tile.pitch + warp_column / 32 + c);
          stored[h][c].load(problem, panel_row + row + 8 * h, group + 32 * c, q, word);
        }
    }
    if constexpr (kBitmap) fetched.fetch(problem, tile, panel_row, panel_step + warp_row, warp_column / 32);
    float sum[2][4][4] = {};
    if (resident) {
      multiply_adapters(sum, lora_A, lora_B, planes_A, planes_B, p.chunk, columns, p.panel_rows, panel_step + warp_row,
                        warp_column);
    } else {
      for (int64_t rank = 0; rank < p.lora_A.rows; rank += p.chunk) {
        __syncthreads();  // the last chunk has been read
        stage_lora_A<kSplit>(lora_A, p.lora_A, rank, first_column, p.chunk, columns);
        stage_lora_B(lora_B, p.lora_B, first_row + step, rank, kMergeStepRows, p.chunk);
        __syncthreads();
        multiply_adapters(sum, lora_A, lora_B, planes_A, planes_B, p.chunk, columns, kMergeStepRows, warp_row, warp_column);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = panel_row + row + 8 * h;
      if (n >= p.out_features) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t k = group + 32 * c;
        float values[8];
        uint32_t kept;
        if constexpr (kBitmap) {
          const int at = (row + 8 * h) * tile.pitch + warp_column / 32;
          const uint32_t words[2] = {ptx::load_shared(tile.words + at), ptx::load_shared(tile.words + at + 1)};
          kept = expand_bitmap<W, kSplit>(values, fetched.values + (lane / 4 + 8 * h) * kMergeValuesPitch, q, words, c);
        } else {
          kept = stored[h][c].expand(values);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = kept >> i & 1 ? fmaf(p.scaling, sum[c][i / 2][2 * h + i % 2], values[i]) : 0.f;
        if constexpr (kValues) {
          stored[h][c].store(problem, n, k, q, values);
        } else {
          Eight<Out> out;
          out.set(values);
          store_columns<Out, kSplit>(static_cast<Out*>(p.merged) + n * p.in_features, k + q * (kSplit ? 4 : 8), p.in_features,
                                     p.merged_vectors, out);
        }
      }
    }
  }
}

// before[n, b] = the values of row n before column b * columns. One warp per row: each lane a block, and 32 of them at a time.
__global__ void __launch_bounds__(kBeforeThreads)
    bitmap_before_kernel(const CompressedProblem problem, uint32_t* before, int columns) {
  const MergeProblem& p = problem.merge;
  const int64_t n = (int64_t{blockIdx.x} * kBeforeThreads + threadIdx.x) / kWarp;
  if (n >= p.out_features) return;
  const int lane = threadIdx.x % kWarp, words = columns / 32;
  uint32_t carry = 0;
  for (int64_t first = 0; first < p.column_blocks; first += kWarp) {
    const int64_t block = first + lane;
    uint32_t count = 0;
    for (int w = 0; w < words && block * words + w < p.mask_words; w += 4) {
      const uint32_t* const from = p.mask + n * p.mask_words + block * words + w;
      if (problem.index_vectors) {
        const uint4 v = ptx::load_global(reinterpret_cast<const uint4*>(from));
        count += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
      } else {
        for (int i = 0; i < 4 && block * words + w + i < p.mask_words; ++i) count += __popc(ptx::load_global(from + i));
      }
    }
    uint32_t sum = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    if (block < p.column_blocks) ptx::store_global(before + n * p.column_blocks + block, carry + sum - count);
    carry += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
}

}  // namespace lors::cuda
