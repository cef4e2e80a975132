// SPDX-License-Identifier: Apache-2.0
// The pieces of adapter_grad_exact.cuh: ExactTile, a block's tile of G [N, K] with the mask of its weights, and ExactMatmul,
// which computes the tile of G = dY^T X. The contractions with the adapters are in adapter_grad_exact.cuh.
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

// A block's tile of G. A warp has 64 rows and kWarpColumns columns of it as accumulators of mma, sum[m][j]: rows from 16 m,
// positions from 8 j. Position = column, except where G is given (kGiven): each lane q of a quad loads 16-byte vectors of G,
// so within 32 columns position 8 j + 2 q + e is column 8 q + 2 j + e, or 16 (j / 2) + 4 q + 2 (j % 2) + e for a float32 G.
template <typename T, int kColumnsOfWarp, bool kIsGiven>
struct ExactTile {
  static constexpr int kWarpColumns = kColumnsOfWarp;
  static constexpr bool kGiven = kIsGiven;
  static constexpr int kColumns = 4 * kWarpColumns, kTiles = kWarpColumns / 8;
  static constexpr int kTerms = sizeof(T) == 4 ? 3 : 1;      // of dY and X
  static constexpr int kColumnPitch = kColumns + kExactPad;  // elements of a row in shared memory
  static constexpr int kKeptPitch = exact_kept_pitch(kColumns);
  static constexpr int kKeptTasks = kExactRows * kColumns / 8 / kExactThreads;
  static constexpr bool kHalves = kGiven && sizeof(T) == 4;  // which of the orders of positions
  using Sum = float[4][kTiles][4];

  const ExactProblem& p;
  int thread, lane, warp_row, warp_column;  // the warp's first row and position in the tile
  int row_tile, column_tile, range;

  __device__ __forceinline__ ExactTile(const ExactProblem& problem, unsigned block_index, unsigned thread_index)
      : p(problem), thread(static_cast<int>(thread_index)) {
    lane = thread % kWarp;
    warp_row = thread / kWarp % 2 * 64;
    warp_column = thread / kWarp / 2 * kWarpColumns;
    // Blocks that run at the same time take a band of 16 tiles across, so that they share reads of dY and X in the L2 cache.
    constexpr int kBand = 16;
    const int tiles = p.row_tiles * p.column_tiles, tile = static_cast<int>(block_index) % tiles;
    range = static_cast<int>(block_index) / tiles;
    const int band = tile / p.row_tiles / kBand, place = tile - band * kBand * p.row_tiles;
    const int left = p.column_tiles - band * kBand, across = left < kBand ? left : kBand;
    row_tile = place / across;
    column_tile = band * kBand + place % across;
  }

  // The tile's first row and column of G. Recomputed at each use, like the addresses below, to save registers.
  __device__ __forceinline__ int64_t row() const { return p.first_row + int64_t{row_tile} * kExactRows; }
  __device__ __forceinline__ int64_t column() const { return int64_t{column_tile} * kColumns; }
  template <typename Element>
  static __device__ __forceinline__ Element* shared(int at) {
    return reinterpret_cast<Element*>(ptx::dynamic_shared() + at);
  }
  static __device__ __forceinline__ uint16_t* stages() { return shared<uint16_t>(0); }
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
      const int first = thread / kWarp * kWarp + (task + i) * kExactThreads;
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
  // The bits of nonzero weights, from task `task` on. Small batches for the wide tile, whose accumulators fill the registers.
  static constexpr int kBatch = kWarpColumns == 64 ? 2 : 4;
  __device__ __forceinline__ void stage_nonzero(int task) const {
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
      const int at = thread / (8 * kVectors) * 8 + thread % 8, v = thread / 8 % kVectors * 4;  // no bank conflicts
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

  // The split terms of 16 rows and 16 positions of the masked tile, as an operand of mma. Masked and split again for every
  // chunk of ranks: otherwise the compiler keeps the terms of the whole tile across chunks, in local memory.
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
        float low = bits >> (kNext * i) & 1 ? sum[m][2 * c + i][2 * h] : 0.f;  // a select: 0 * inf would be NaN
        float high = bits >> (kNext * i + 1) & 1 ? sum[m][2 * c + i][2 * h + 1] : 0.f;
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

// The tile of G = dY^T X over a range of tokens, kStep at a time: the copies of later steps overlap the matmul of this one.
// 16-bit dtypes are copied by cp.async; float32 goes through registers and is split into three bf16 terms.
template <typename T, int kWarpColumns>
struct ExactMatmul : ExactTile<T, kWarpColumns, false> {
  using Tile = ExactTile<T, kWarpColumns, false>;
  using Tile::column;
  using Tile::kColumnPitch;
  using Tile::kColumns;
  using Tile::kKeptTasks;
  using Tile::kTerms;
  using Tile::kTiles;
  using Tile::lane;
  using Tile::p;
  using Tile::range;
  using Tile::row;
  using Tile::stages;
  using Tile::thread;
  using Tile::Tile;
  using Tile::warp_column;
  using Tile::warp_row;
  using typename Tile::Sum;
  static constexpr int kStep = exact_step(kTerms), kStages = exact_stages(kTerms, kColumns);
  static constexpr int kRowPitch = kExactRows + kExactPad;
  static constexpr int kInputAt = kTerms * kStep * kRowPitch, kStage = kTerms * kStep * (kRowPitch + kColumnPitch);

  __device__ __forceinline__ int64_t first_token() const { return range * p.range_tokens; }
  __device__ __forceinline__ int64_t end_token() const {
    const int64_t end = first_token() + p.range_tokens;
    return end < p.tokens ? end : p.tokens;
  }

  // Tokens [token, token + kStep) of kWide columns of a matrix to shared memory [kStep][kWide + pad]; zeros outside the
  // matrix. By cp.async where its rows are aligned.
  template <int kWide>
  __device__ __forceinline__ void copy_step(uint16_t* to, const void* data, int64_t token, int64_t first, int64_t columns,
                                            bool vectors) const {
    constexpr int kAcross = kWide / 8, kRows = kExactThreads / kAcross;
    const int64_t k = first + thread % kAcross * 8;
    const T* from = static_cast<const T*>(data) + (token + thread / kAcross) * columns;
    uint16_t* at = to + thread / kAcross * (kWide + kExactPad) + thread % kAcross * 8;
#pragma unroll
    for (int i = 0; i < kStep / kRows; ++i) {
      const bool inside = token + thread / kAcross + i * kRows < end_token();
      if (vectors) {
        const bool copied = inside && k < columns;
        ptx::cp_async_16(ptx::shared_address(at), copied ? static_cast<const void*>(from + k) : data, copied ? 16 : 0);
      } else {
        ptx::store_shared(reinterpret_cast<uint4*>(at), load_eight(from, k, inside ? columns : 0, false).vector[0]);
      }
      from += kRows * columns;
      at += kRows * (kWide + kExactPad);
    }
  }
  __device__ __forceinline__ void copy_stage(int step) const {
    const int64_t token = first_token() + int64_t{step} * kStep;
    if (token < end_token()) {
      uint16_t* const to = stages() + step % kStages * kStage;
      copy_step<kExactRows>(to, p.grad_output, token, row(), p.all_rows, p.grad_output_vectors);
      copy_step<kColumns>(to + kInputAt, p.input, token, column(), p.columns, p.input_vectors);
    }
    ptx::cp_async_commit();
  }

  // float32: the next step's vectors of dY and X, held in registers until they are split and stored to their stage.
  struct Ahead {
    uint4 grad_output[2], input[2];
  };
  __device__ __forceinline__ void fetch_stage(Ahead& ahead, int step) const {
    static_assert(kTerms == 1 || (kStep == 16 && kColumns == 128 && kExactRows == 128));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = first_token() + int64_t{step} * kStep + 8 * i + thread / kWarp;
      const bool inside = token < end_token();
      ahead.grad_output[i] = load_four<false>(static_cast<const float*>(p.grad_output) + token * p.all_rows, row() + 4 * lane,
                                              inside ? p.all_rows : 0, p.grad_output_vectors);
      ahead.input[i] = load_four<false>(static_cast<const float*>(p.input) + token * p.columns, column() + 4 * lane,
                                        inside ? p.columns : 0, p.input_vectors);
    }
  }
  __device__ __forceinline__ void put_stage(const Ahead& ahead, int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint16_t* const to = stages() + step % kStages * kStage + (8 * i + thread / kWarp) * kRowPitch + 4 * lane;
      store_terms<float>(to, kStep * kRowPitch, ahead.grad_output[i]);
      store_terms<float>(to + kInputAt, kStep * kRowPitch, ahead.input[i]);
    }
  }

  __device__ __forceinline__ void multiply(Sum& sum, int step) const {
    const uint16_t* const stage = stages() + step % kStages * kStage;
    const uint32_t from_rows =
        ptx::shared_address(stage + (lane % 8 + lane / 16 * 8) * kRowPitch + warp_row + lane / 8 % 2 * 8);
    const uint32_t from_columns =
        ptx::shared_address(stage + kInputAt + lane % 16 * kColumnPitch + warp_column + lane / 16 * 8);
    if constexpr (kTerms == 1) {
#pragma unroll
      for (int t = 0; t < kStep; t += 16) {
        uint32_t a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) ptx::ldmatrix_x4_trans(a[m], from_rows + 2 * (t * kRowPitch + 16 * m));
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, from_columns + 2 * (t * kColumnPitch + 8 * j));
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            ptx::mma_m16n8k16<T>(sum[m][j], a[m], b[0], b[1]);
            ptx::mma_m16n8k16<T>(sum[m][j + 1], a[m], b[2], b[3]);
          }
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t a[3][4];
#pragma unroll
        for (int i = 0; i < 3; ++i) ptx::ldmatrix_x4_trans(a[i], from_rows + 2 * (i * kStep * kRowPitch + 16 * m));
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[3][4];
#pragma unroll
          for (int i = 0; i < 3; ++i) ptx::ldmatrix_x4_trans(b[i], from_columns + 2 * (i * kStep * kColumnPitch + 8 * j));
          // A sum of its own per step, small terms first: the long sum is then rounded once per step, and to nearest,
          // which tensor cores do not promise.
          float part[2][4] = {};
#pragma unroll
          for (int order = 2; order >= 0; --order)
#pragma unroll
            for (int i = 0; i <= order; ++i) {
              ptx::mma_m16n8k16<bfloat16>(part[0], a[i], b[order - i][0], b[order - i][1]);
              ptx::mma_m16n8k16<bfloat16>(part[1], a[i], b[order - i][2], b[order - i][3]);
            }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[m][j][e] += part[0][e];
            sum[m][j + 1][e] += part[1][e];
          }
        }
      }
    }
  }

  // sum = dY^T X over the block's tokens, with the mask staged during the steps (two groups of eight weights per thread and
  // step). meanwhile() stages what else is needed, while the first copies are in flight.
  template <typename Meanwhile>
  __device__ __forceinline__ void matmul(Sum& sum, Meanwhile meanwhile) const {
    const int steps = static_cast<int>((end_token() - first_token() + kStep - 1) / kStep);
    int task = p.mask == nullptr ? 0 : kKeptTasks;
    Ahead ahead;
    if constexpr (kTerms == 1) {
#pragma unroll
      for (int step = 0; step < kStages - 1; ++step) copy_stage(step);
    } else {
      fetch_stage(ahead, 0);
    }
    meanwhile();
    if (p.mask != nullptr) this->stage_mask();
    if constexpr (kTerms == 3) put_stage(ahead, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if constexpr (kTerms == 1) ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this step has arrived, and the stage that the next copy overwrites has been read
      if constexpr (kTerms == 1)
        copy_stage(step + kStages - 1);
      else if (step + 1 < steps)
        fetch_stage(ahead, step + 1);
      typename Tile::template Weights<2> weights;
      const bool more = task < kKeptTasks;
      if (more) this->fetch_weights(weights, task);
      multiply(sum, step);
      if (more) this->put_weights(weights, task);
      task += more ? 2 : 0;
      if constexpr (kTerms == 3)
        if (step + 1 < steps) put_stage(ahead, step + 1);
    }
    this->stage_nonzero(task);
    if constexpr (kTerms == 1) ptx::cp_async_wait<0>();
    __syncthreads();
  }
};

}  // namespace lors::cuda
