// SPDX-License-Identifier: Apache-2.0
// A block's tile of a given G [N, K] with the mask of its weights. The contractions with the adapters are in
// masked_contract.cuh.
#pragma once

#include "masked_contract_config.h"
#include "operands.cuh"

namespace lors::cuda {

struct ContractProblem {
  const void* grad_weight;  // G [N, K] row-major, of the kernel's type T
  const void* weight;       // [N, K] row-major, of weight_dtype; read only where `mask` is null
  const uint32_t* mask;     // [N, mask_pitch] words of bits, 1 = kept; null: kept where weight != 0
  int64_t mask_pitch;       // words from row to row of the mask
  Matrix lora_A;            // [r, K]
  Matrix lora_B;            // [N, r]
  float* partial_A;         // [row_tiles, K, width]; null: not wanted
  float* partial_B;         // [column_tiles, rows - first_row, width]; null: not wanted
  int64_t columns;          // K
  int64_t first_row, rows;  // this launch has the rows [first_row, rows)
  int64_t width;
  int row_tiles, column_tiles;
  ContractShared shared;
  DType weight_dtype;
  bool grad_weight_vectors, weight_vectors, mask_vectors;
};

// Elements [column, column + 4) of a row of `columns` floats; zeros beyond its end. `column` is a multiple of 4. One vector
// per lane, because the lanes of a warp then read whole 32-byte sectors, which they do not with the two of load_eight.
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

// A bit per element of a vector: whether it is nonzero. -0.0 is zero.
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

// A warp has 64 rows and kWarpColumns columns of the tile as accumulators of mma, sum[m][j]: rows from 16 m, positions from 8 j.
// Each lane q of a quad loads 16-byte vectors of G, so within 32 columns position 8 j + 2 q + e is column 8 q + 2 j + e, or
// 16 (j / 2) + 4 q + 2 (j % 2) + e for a float32 G.
template <typename T>
struct ContractTile {
  static constexpr int kColumns = kContractColumns, kWarpColumns = kColumns / 4, kTiles = kWarpColumns / 8;
  static constexpr int kColumnPitch = kColumns + kContractPad;  // elements of a row in shared memory
  static constexpr int kKeptPitch = kColumns / 32;              // words of a row
  static constexpr int kKeptTasks = kContractRows * kColumns / 8 / kContractThreads;
  static constexpr bool kHalves = sizeof(T) == 4;  // which of the orders of positions
  using Sum = float[4][kTiles][4];

  const ContractProblem& p;
  int thread, lane, warp_row, warp_column;  // the warp's first row and position in the tile
  int row_tile, column_tile;

  __device__ __forceinline__ ContractTile(const ContractProblem& problem, unsigned block_index, unsigned thread_index)
      : p(problem), thread(static_cast<int>(thread_index)) {
    lane = thread % kWarp;
    warp_row = thread / kWarp % 2 * 64;
    warp_column = thread / kWarp / 2 * kWarpColumns;
    row_tile = static_cast<int>(block_index) / p.column_tiles;
    column_tile = static_cast<int>(block_index) % p.column_tiles;
  }

  // The tile's first row and column of G. Recomputed at each use, like the addresses below, to save registers.
  __device__ __forceinline__ int64_t row() const { return p.first_row + int64_t{row_tile} * kContractRows; }
  __device__ __forceinline__ int64_t column() const { return int64_t{column_tile} * kColumns; }
  template <typename Element>
  static __device__ __forceinline__ Element* shared(int at) {
    return reinterpret_cast<Element*>(ptx::dynamic_shared() + at);
  }
  __device__ __forceinline__ uint32_t* kept() const { return shared<uint32_t>(p.shared.kept); }

  // ---- the mask: bits of the tile in shared memory ------------------------------------------------------------------------

  static constexpr int kEights = kColumns / 8;  // groups of eight weights in a row of the tile

  // `kCount` groups of eight weights per lane, loaded and not yet turned into bits. 16-bit weight: the group is vector[0].
  // float32: a pair of lanes has the two halves of one group in vector[0] and those of another in vector[1].
  template <int kCount>
  struct Weights {
    uint4 vector[kCount][2];
  };
  template <int kCount>
  __device__ __forceinline__ void fetch_weights(Weights<kCount>& w, int task) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (task + i >= kKeptTasks) break;
      const int first = thread / kWarp * kWarp + (task + i) * kContractThreads;
      if (p.weight_dtype == DType::float32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = first + 16 * half + lane / 2;
          const int64_t n = row() + eight / kEights, k = column() + eight % kEights * 8 + lane % 2 * 4;
          w.vector[i][half] = load_four<true>(static_cast<const float*>(p.weight) + n * p.columns, k,
                                              n < p.rows ? p.columns : 0, p.weight_vectors);
        }
      } else {  // read as bfloat16, whichever 16-bit type it is: only zero bits matter
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
      int eight = thread / kWarp * kWarp + (task + i) * kContractThreads + lane;
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
  // The bits of nonzero weights.
  __device__ __forceinline__ void stage_nonzero() const {
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int task = 0; task < kKeptTasks; task += kBatch) {
      Weights<kBatch> w;
      fetch_weights(w, task);
      put_weights(w, task);
    }
  }

  __device__ __forceinline__ void stage_mask() const {
    if (p.mask_vectors) {
      constexpr int kVectors = kColumns / 128;
      if (thread >= kContractRows * kVectors) return;
      const int at = thread / (8 * kVectors) * 8 + thread % 8, v = thread / 8 % kVectors * 4;  // no bank conflicts
      const int64_t n = row() + at, word = column() / 32 + v;
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (n < p.rows && word < p.mask_pitch)
        bits = ptx::load_global_once(reinterpret_cast<const uint4*>(p.mask + n * p.mask_pitch + word));
      ptx::store_shared(reinterpret_cast<uint4*>(kept() + at * kKeptPitch + v), bits);
    } else {
      constexpr int kWords = kColumns / 32;
      for (int task = thread; task < kContractRows * kWords; task += kContractThreads) {
        const int64_t n = row() + task / kWords, word = column() / 32 + task % kWords;
        const bool inside = n < p.rows && word < p.mask_pitch;
        ptx::store_shared(kept() + task / kWords * kKeptPitch + task % kWords,
                          inside ? ptx::load_global(p.mask + n * p.mask_pitch + word) : 0u);
      }
    }
  }

  // The split terms of 16 rows and 16 positions of the masked tile, as an operand of mma. Masked and split again for every
  // chunk of ranks: otherwise the compiler keeps the terms of the whole tile across chunks, in local memory.
  __device__ __forceinline__ void split(uint32_t (&g)[3][4], const Sum& sum, int m, int c) const {
    const int q = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t* word = kept() + (warp_row + 16 * m + 8 * h + lane / 4) * kKeptPitch + (warp_column + 16 * c) / 32;
      const int first = kHalves ? 16 * (c % 2) + 4 * q : 4 * (c % 2) + 8 * q;
      const uint32_t bits = ptx::load_shared(word) >> first;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low = bits >> (2 * i) & 1 ? sum[m][2 * c + i][2 * h] : 0.f;  // a select: 0 * inf would be NaN
        float high = bits >> (2 * i + 1) & 1 ? sum[m][2 * c + i][2 * h + 1] : 0.f;
#pragma unroll
        for (int term = 0; term < 3; ++term) g[term][2 * i + h] = next_term_pair(low, high);
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
          const T* const from = static_cast<const T*>(p.grad_weight) + n * p.columns;
          float values[8];
          if constexpr (kHalves)
            Eight<float>{{load_four<true>(from, k + 4 * q, columns, p.grad_weight_vectors),
                          load_four<true>(from, k + 16 + 4 * q, columns, p.grad_weight_vectors)}}
                .get(values);
          else
            load_eight<T, true>(from, k + 8 * q, columns, p.grad_weight_vectors).get(values);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[m][4 * group + i / 2][2 * h + i % 2] = values[i];
        }
  }
};

}  // namespace lors::cuda
