// SPDX-License-Identifier: Apache-2.0
// A block's tile of the masked G = dY^T X (adapter_grad_exact.cuh): where its threads stand in it, and which weights are kept.
#pragma once

#include "adapter_grad_exact_config.h"
#include "operands.cuh"

namespace lors::cuda {

struct ExactProblem {
  const void* grad_output;  // dY [tokens, N] row-major, of the kernel's type T; or the given G [N, K]
  const void* input;        // X [tokens, K] row-major, of the kernel's type T; null where G is given
  const void* weight;       // [N, K] row-major, of weight_dtype; read only where `mask` is null
  const uint32_t* mask;     // [N, mask_pitch] words of bits, 1 = kept; null: kept where weight != 0
  int64_t mask_pitch;       // words from row to row of the mask
  Matrix lora_A;            // [r, K]
  Matrix lora_B;            // [N, r]
  float* partial_A;         // [ranges x row_tiles, K, width]; null: not wanted
  float* partial_B;         // [ranges x column_tiles, rows - first_row, width]; null: not wanted
  int64_t tokens, columns;  // columns: K
  int64_t all_rows;         // N
  int64_t first_row, rows;  // this launch has the rows [first_row, rows)
  int64_t range_tokens, width;
  int row_tiles, column_tiles;
  ExactShared shared;
  DType weight_dtype;
  bool grad_output_vectors, input_vectors, weight_vectors, mask_vectors;
};

// Elements [column, column + 4) of a row of `columns` floats; zeros beyond its end. `column` is a multiple of 4. Lanes that
// take neighbouring fours fill whole sectors, which they do not with two vectors each.
template <bool kOnce>
__device__ __forceinline__ uint4 load_four(const float* row, int64_t column, int64_t columns, bool vectors) {
  uint32_t word[4] = {};
  if (vectors) {
    const uint4* from = reinterpret_cast<const uint4*>(row + column);
    if (column < columns) return kOnce ? ptx::load_global_once(from) : ptx::load_global(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) word[i] = __float_as_uint(ptx::load_global(row + column + i));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Bits of a vector's elements: 1 where not zero, of either sign.
template <int kSize>
__device__ __forceinline__ uint32_t nonzero_bits(const uint4& vector) {
  const uint32_t word[4] = {vector.x, vector.y, vector.z, vector.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kSize == 4)
      bits |= uint32_t((word[i] & 0x7fffffffu) != 0) << i;
    else
      bits |= uint32_t((word[i] & 0x7fffu) != 0) << (2 * i) | uint32_t((word[i] & 0x7fff0000u) != 0) << (2 * i + 1);
  }
  return bits;
}

// One block's work. A warp has 64 rows and kWarpColumns columns of G as sum[m][j]: rows 16 m, positions 8 j, as mma leaves
// them. Positions are columns, except where kGiven: there lane q of a quad loads 16-byte vectors, so that of 32 columns
// position 8 j + 2 q + e has column 8 q + 2 j + e, or, of a float32 G, 16 (j / 2) + 4 q + 2 (j % 2) + e.
template <typename T, int kColumnsOfWarp, bool kIsGiven>
struct ExactTile {
  static constexpr int kWarpColumns = kColumnsOfWarp;
  static constexpr bool kGiven = kIsGiven;
  static constexpr int kColumns = 4 * kWarpColumns, kTiles = kWarpColumns / 8;
  static constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;     // of dY and X
  static constexpr int kColumnPitch = kColumns + kExactPad;  // elements of a row in shared memory
  static constexpr int kKeptPitch = exact_kept_pitch(kColumns);
  static constexpr int kKeptTasks = kExactRows * kColumns / 8 / kExactThreads;
  static constexpr bool kHalves = kGiven && sizeof(T) == 4;  // which of the orders of positions
  using Sum = float[4][kTiles][4];

  const ExactProblem& p;
  int thread, lane, warp_row, warp_column;  // rows and columns of the tile
  int row_tile, column_tile, range;

  __device__ __forceinline__ ExactTile(const ExactProblem& problem, unsigned block_index, unsigned thread_index)
      : p(problem), thread(static_cast<int>(thread_index)) {
    lane = thread % kWarp;
    warp_row = thread / kWarp % 2 * 64;
    warp_column = thread / kWarp / 2 * kWarpColumns;
    // Blocks that run together take a band of 16 tiles of columns: they share what they read of dY and X.
    constexpr int kBand = 16;
    const int tiles = p.row_tiles * p.column_tiles, tile = static_cast<int>(block_index) % tiles;
    range = static_cast<int>(block_index) / tiles;
    const int band = tile / p.row_tiles / kBand, place = tile - band * kBand * p.row_tiles;
    const int left = p.column_tiles - band * kBand, across = left < kBand ? left : kBand;
    row_tile = place / across;
    column_tile = band * kBand + place % across;
  }

  // First of the tile. These, and the places in shared memory, are worked out where they are used: registers are few.
  __device__ __forceinline__ int64_t row() const { return p.first_row + int64_t{row_tile} * kExactRows; }
  __device__ __forceinline__ int64_t column() const { return int64_t{column_tile} * kColumns; }
  template <typename Element>
  static __device__ __forceinline__ Element* shared(int at) {
    return reinterpret_cast<Element*>(ptx::dynamic_shared() + at);
  }
  static __device__ __forceinline__ uint16_t* stages() { return shared<uint16_t>(0); }
  __device__ __forceinline__ uint32_t* kept() const { return shared<uint32_t>(p.shared.kept); }

  // ---- which weights are kept --------------------------------------------------------------------------------------------

  static constexpr int kEights = kColumns / 8;  // in a row of the tile

  // `kCount` x 32 eights per warp on their way to bits, from task `task` on. Of a 16-bit weight, a lane has one eight in
  // vector[0]; of a float32 weight, neighbouring lanes have the halves of one eight in vector[0] and of another in vector[1].
  template <int kCount>
  struct Weights {
    uint4 vector[kCount][2];
  };
  template <int kCount>
  __device__ __forceinline__ void fetch_weights(Weights<kCount>& w, int task) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (task + i >= kKeptTasks) break;
      const int first = thread / kWarp * kWarp + (task + i) * kExactThreads;
      if (p.weight_dtype == DType::float32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = first + 16 * half + lane / 2;
          const int64_t n = row() + eight / kEights, k = column() + eight % kEights * 8 + lane % 2 * 4;
          w.vector[i][half] = load_four<true>(static_cast<const float*>(p.weight) + n * p.columns, k,
                                              n < p.rows ? p.columns : 0, p.weight_vectors);
        }
      } else {  // bits are bits
        const int eight = first + lane;
        const int64_t n = row() + eight / kEights, k = column() + eight % kEights * 8;
        w.vector[i][0] = load_eight<bfloat16, true>(static_cast<const bfloat16*>(p.weight) + n * p.columns, k,
                                                    n < p.rows ? p.columns : 0, p.weight_vectors)
                             .vector[0];
      }
    }
  }
  template <int kCount>
  __device__ __forceinline__ void put_weights(const Weights<kCount>& w, int task) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (task + i >= kKeptTasks) break;
      int eight = thread / kWarp * kWarp + (task + i) * kExactThreads + lane;
      uint32_t bits;
      if (p.weight_dtype == DType::float32) {
        const uint32_t low = nonzero_bits<4>(w.vector[i][0]), high = nonzero_bits<4>(w.vector[i][1]);
        const bool odd = lane % 2;
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
        bits = odd ? other | high << 4 : low | other << 4;
        eight += lane / 2 - lane + 16 * odd;
      } else {
        bits = nonzero_bits<2>(w.vector[i][0]);
      }
      uint8_t* to = reinterpret_cast<uint8_t*>(kept()) + eight / kEights * 4 * kKeptPitch + eight % kEights;
      ptx::store_shared(to, static_cast<uint8_t>(bits));
    }
  }
  // All from task `task` on. The wide tile's sums leave few registers.
  static constexpr int kBatch = kWarpColumns == 64 ? 2 : 4;
  __device__ __forceinline__ void find_weights(int task) const {
#pragma unroll 1
    for (; task < kKeptTasks; task += kBatch) {
      Weights<kBatch> w;
      fetch_weights(w, task);
      put_weights(w, task);
    }
  }

  __device__ __forceinline__ void stage_mask() const {
    if (p.mask_vectors) {
      constexpr int kVectors = kColumns / 128;
      if (thread >= kExactRows * kVectors) return;
      const int at = thread / (8 * kVectors) * 8 + thread % 8, v = thread / 8 % kVectors * 4;  // eight rows: no bank twice
      const int64_t n = row() + at, word = column() / 32 + v;
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (n < p.rows && word < p.mask_pitch)
        bits = ptx::load_global_once(reinterpret_cast<const uint4*>(p.mask + n * p.mask_pitch + word));
      ptx::store_shared(reinterpret_cast<uint4*>(kept() + at * kKeptPitch + v), bits);
    } else {
      constexpr int kWords = kColumns / 32;
      for (int task = thread; task < kExactRows * kWords; task += kExactThreads) {
        const int64_t n = row() + task / kWords, word = column() / 32 + task % kWords;
        const bool inside = n < p.rows && word < p.mask_pitch;
        ptx::store_shared(kept() + task / kWords * kKeptPitch + task % kWords,
                          inside ? ptx::load_global(p.mask + n * p.mask_pitch + word) : 0u);
      }
    }
  }

  // The planes of 16 rows and 16 positions of the masked tile, as an operand of mma. The mask is applied here, anew for each
  // ranks, because the compiler would else keep all planes of the tile from one turn to the next, in local memory.
  __device__ __forceinline__ void split(uint32_t (&g)[3][4], const Sum& sum, int m, int c) const {
    const int q = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t* word = kept() + (warp_row + 16 * m + 8 * h + lane / 4) * kKeptPitch + (warp_column + 16 * c) / 32;
      const int first = !kGiven ? 16 * (c % 2) + 2 * q : kHalves ? 16 * (c % 2) + 4 * q : 4 * (c % 2) + 8 * q;
      const uint32_t bits = ptx::load_shared(word) >> first;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        constexpr int kNext = kGiven ? 2 : 8;
        float low = bits >> (kNext * i) & 1 ? sum[m][2 * c + i][2 * h] : 0.f;  // also where the sum is infinite
        float high = bits >> (kNext * i + 1) & 1 ? sum[m][2 * c + i][2 * h + 1] : 0.f;
#pragma unroll
        for (int plane = 0; plane < 3; ++plane) g[plane][2 * i + h] = next_plane_pair(low, high);
      }
    }
  }

  __device__ __forceinline__ void load_given(Sum& sum) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int group = 0; group < kTiles / 4; ++group) {
          const int64_t n = row() + warp_row + 16 * m + 8 * h + g;
          const int64_t k = column() + warp_column + 32 * group, columns = n < p.rows ? p.columns : 0;
          const T* const from = static_cast<const T*>(p.grad_output) + n * p.columns;
          float values[8];
          if constexpr (kHalves)
            Eight<float>{{load_four<true>(from, k + 4 * q, columns, p.grad_output_vectors),
                          load_four<true>(from, k + 16 + 4 * q, columns, p.grad_output_vectors)}}
                .get(values);
          else
            load_eight<T, true>(from, k + 8 * q, columns, p.grad_output_vectors).get(values);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[m][4 * group + i / 2][2 * h + i % 2] = values[i];
        }
  }
};

}  // namespace lors::cuda
