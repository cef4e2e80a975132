// SPDX-License-Identifier: Apache-2.0
// With G = dY^T X [N, K], or a given G, masked where the weight is zero and never in memory:
//   partial_B[n, p] = sum over a tile's k of G[n, k] lora_A[p, k]      partial_A[k, p] = sum over a tile's n of G[n, k]
//   lora_B[n, p]
// The masked sums stay fp32: both contractions take them as three bfloat16 planes, from the registers they were summed in.
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
template <typename T, int kWarpColumns, bool kGiven>
struct ExactBlock {
  static constexpr int kColumns = 4 * kWarpColumns, kTiles = kWarpColumns / 8;
  static constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;  // of dY and X
  static constexpr int kStep = exact_step(kPlanes), kStages = exact_stages(kPlanes, kColumns);
  static constexpr int kRowPitch = kExactRows + kExactPad, kColumnPitch = kColumns + kExactPad;  // elements
  static constexpr int kInputAt = kPlanes * kStep * kRowPitch, kStage = kPlanes * kStep * (kRowPitch + kColumnPitch);
  static constexpr int kSlabPitch = kWarpColumns + kExactPad, kSlab = 16 * kSlabPitch;  // elements, one plane
  static constexpr int kRankPitch = kExactRanks + kExactPad;
  static constexpr int kKeptPitch = exact_kept_pitch(kColumns);
  static constexpr int kKeptTasks = kExactRows * kColumns / 8 / kExactThreads;
  static constexpr bool kHalves = kGiven && sizeof(T) == 4;  // which of the orders of positions
  using Sum = float[4][kTiles][4];

  const ExactProblem& p;
  int thread, lane, warp_row, warp_column;  // rows and columns of the tile
  int row_tile, column_tile, range;

  __device__ __forceinline__ ExactBlock(const ExactProblem& problem, unsigned block_index, unsigned thread_index)
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
  __device__ __forceinline__ uint16_t* lora_A() const { return shared<uint16_t>(p.shared.lora_A); }
  __device__ __forceinline__ uint16_t* lora_B() const { return shared<uint16_t>(p.shared.lora_B); }
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

  // ---- the tile of G -----------------------------------------------------------------------------------------------------

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

  // The given G, which rows of the weight are kept, and the first ranks of the adapters.
  __device__ __forceinline__ void load(Sum& sum) const {
    if (p.mask != nullptr)
      stage_mask();
    else
      find_weights(0);
    stage_adapters(0);
    load_given(sum);
    __syncthreads();
  }

  __device__ __forceinline__ int64_t first_token() const { return range * p.range_tokens; }
  __device__ __forceinline__ int64_t end_token() const {
    const int64_t end = first_token() + p.range_tokens;
    return end < p.tokens ? end : p.tokens;
  }

  // kStep tokens from `token` on of kWide columns of a matrix, to [kStep][kWide + pad]; zeros outside it. In the background
  // where the matrix has vectors.
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

  // float32: a step's fours of dY and of X wait in registers and are split into planes on their way to the stage.
  struct Ahead {
    uint4 grad_output[2], input[2];
  };
  __device__ __forceinline__ void fetch_stage(Ahead& ahead, int step) const {
    static_assert(kGiven || kPlanes == 1 || (kStep == 16 && kColumns == 128 && kExactRows == 128));
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
  static __device__ __forceinline__ void put_planes(uint16_t* to, const uint4& four) {
    float rest[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z), __uint_as_float(four.w)};
#pragma unroll
    for (int plane = 0; plane < 3; ++plane, to += kStep * kRowPitch) {
      const uint32_t low = next_plane_pair(rest[0], rest[1]);
      ptx::store_shared(reinterpret_cast<uint2*>(to), make_uint2(low, next_plane_pair(rest[2], rest[3])));
    }
  }
  __device__ __forceinline__ void put_stage(const Ahead& ahead, int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint16_t* const to = stages() + step % kStages * kStage + (8 * i + thread / kWarp) * kRowPitch + 4 * lane;
      put_planes(to, ahead.grad_output[i]);
      put_planes(to + kInputAt, ahead.input[i]);
    }
  }

  __device__ __forceinline__ void multiply(Sum& sum, int step) const {
    const uint16_t* const stage = stages() + step % kStages * kStage;
    const uint32_t from_rows =
        ptx::shared_address(stage + (lane % 8 + lane / 16 * 8) * kRowPitch + warp_row + lane / 8 % 2 * 8);
    const uint32_t from_columns =
        ptx::shared_address(stage + kInputAt + lane % 16 * kColumnPitch + warp_column + lane / 16 * 8);
    if constexpr (kPlanes == 1) {
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
          // Summed apart, small terms first: the long sum is then rounded once per step, to nearest.
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

  // sum = dY^T X over the block's tokens. The weight comes in meanwhile, two eights per thread and step.
  __device__ __forceinline__ void product(Sum& sum) const {
    const int steps = static_cast<int>((end_token() - first_token() + kStep - 1) / kStep);
    int task = p.mask == nullptr ? 0 : kKeptTasks;
    Ahead ahead;
    if constexpr (kPlanes == 1) {
#pragma unroll
      for (int step = 0; step < kStages - 1; ++step) copy_stage(step);
    } else {
      fetch_stage(ahead, 0);
    }
    stage_adapters(0);
    if (p.mask != nullptr) stage_mask();
    if constexpr (kPlanes == 3) put_stage(ahead, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if constexpr (kPlanes == 1) ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the step is there, and the stage that comes next has been read
      if constexpr (kPlanes == 1)
        copy_stage(step + kStages - 1);
      else if (step + 1 < steps)
        fetch_stage(ahead, step + 1);
      Weights<2> weights;
      const bool more = task < kKeptTasks;
      if (more) fetch_weights(weights, task);
      multiply(sum, step);
      if (more) put_weights(weights, task);
      task += more ? 2 : 0;
      if constexpr (kPlanes == 3)
        if (step + 1 < steps) put_stage(ahead, step + 1);
    }
    find_weights(task);
    if constexpr (kPlanes == 1) ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // ---- the contractions --------------------------------------------------------------------------------------------------

  // Ranks [rank, rank + kExactRanks) of both adapters, as planes.
  __device__ __forceinline__ void stage_adapters(int rank) const {
    if (p.partial_B != nullptr) {
      const int count = planes_of(p.lora_A.dtype);
      for (int task = thread; task < kExactRanks * kColumns / 8; task += kExactThreads) {
        // Four lanes to each of eight ranks' 32 columns, or all lanes along one rank: whichever order keeps banks apart.
        const int block = task / kWarp, r = kGiven ? block % 2 * 8 + lane / 4 : task / (kColumns / 8), x = lane % 4;
        const int k = kGiven ? block / 2 * 32 + 8 * x : task % (kColumns / 8) * 8;
        float values[8];
        load_eight(values, p.lora_A, rank + r, column() + k);
        const bool swap = kHalves && (r & 2);  // the pairs in another order: so that half of the rows meet other banks
        if constexpr (kHalves) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = values[i], high = values[i + 4];
            values[i] = swap ? high : low;
            values[i + 4] = swap ? low : high;
          }
        }
        uint16_t* to = lora_A() + r * kColumnPitch + (kGiven ? k - 8 * x : k);
        for (int plane = 0; plane < count; ++plane, to += kExactRanks * kColumnPitch) {
          uint32_t word[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) word[j] = next_plane_pair(values[2 * j], values[2 * j + 1]);
          if constexpr (kGiven) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int j = swap ? i ^ 2 : i;  // the pair is columns 8 x + 2 j and the next
              const int position = kHalves ? 16 * (x / 2) + 8 * (j % 2) + 4 * (x % 2) + 2 * (j / 2) : 8 * j + 2 * x;
              ptx::store_shared(reinterpret_cast<uint32_t*>(to + position), word[i]);
            }
          } else {
            ptx::store_shared(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
          }
        }
      }
    }
    if (p.partial_A != nullptr) {
      static_assert(kExactRows * kExactRanks / 8 == kExactThreads);
      const int count = planes_of(p.lora_B.dtype), n = thread / 16 * 8 + thread % 8, r = thread / 8 % 2 * 8;
      float values[8];
      load_eight(values, p.lora_B, row() + n, rank + r);
      uint16_t* to = lora_B() + n * kRankPitch + r;
      for (int plane = 0; plane < count; ++plane, to += kExactRows * kRankPitch) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) word[j] = next_plane_pair(values[2 * j], values[2 * j + 1]);
        ptx::store_shared(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
      }
    }
  }

  // part[16 x 16] += a b, for planes a of G and those of an adapter, which load_b(plane, b) brings; from small ones to large.
  template <typename Load>
  static __device__ __forceinline__ void multiply_planes(float (&part)[2][4], const uint32_t (&a)[3][4], int planes,
                                                         Load load_b) {
#pragma unroll
    for (int j = 2; j >= 0; --j) {
      if (j >= planes) continue;
      uint32_t b[4];
      load_b(j, b);
#pragma unroll
      for (int i = 2 - j; i >= 0; --i) {
        ptx::mma_m16n8k16<bfloat16>(part[0], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<bfloat16>(part[1], a[i], b[2], b[3]);
      }
    }
  }

  // The column of a position of the tile.
  static __device__ __forceinline__ int column_of(int position) {
    const int j = position % 32 / 8, q = position % 8 / 2, first = position / 32 * 32 + position % 2;
    return !kGiven ? position : kHalves ? first + 16 * (j / 2) + 4 * q + 2 * (j % 2) : first + 8 * q + 2 * j;
  }

  // Where ranks [8 i + 2 q, 8 i + 2 q + 2) of row `at` of a warp's sums lie: no two of a half warp's pairs share a bank.
  static __device__ __forceinline__ int sum_place(int at, int i) { return at * kExactRanks + (i ^ (at / 2 & 1)) * 8; }
  __device__ __forceinline__ void store_sums(float* to, int at, const float (&part)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::store_shared(reinterpret_cast<float2*>(to + sum_place(at + 8 * h + lane / 4, i) + lane % 4 * 2),
                          make_float2(part[i][2 * h], part[i][2 * h + 1]));
  }

  // Adds up what `kParts` warps have of `kAt` rows, and writes it to global memory.
  template <int kParts, int kAt, typename Where>
  __device__ __forceinline__ void write_sums(const float* from, int rank, Where where) const {
#pragma unroll 1  // the addresses of all turns, kept from one chunk of ranks to the next, would not fit
    for (int task = 0; task < kAt * kExactRanks / 4; task += kExactThreads) {
      const int at = (task + thread) / 4, i = (task + thread) % 4;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float4 v = ptx::load_shared(
            reinterpret_cast<const float4*>(from + part * kAt * kExactRanks + sum_place(at, i / 2) + i % 2 * 4));
        total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
      }
      float* const to = where(at);
      if (to != nullptr && rank + 4 * i < p.width) ptx::store_global(reinterpret_cast<float4*>(to + rank + 4 * i), total);
    }
  }

  // Both contractions of the masked tile with the ranks from `rank` on. Those from 0 on have been staged.
  __device__ __forceinline__ void contract(const Sum& sum, int rank) const {
    const int warp = thread / kWarp, planes_A = planes_of(p.lora_A.dtype), planes_B = planes_of(p.lora_B.dtype);
    const bool want_A = p.partial_A != nullptr, want_B = p.partial_B != nullptr;
    uint16_t* const slab = stages() + warp * kExactGradientPlanes * kSlab;  // this warp's own
    float* const sums_A = shared<float>(p.shared.sums_A);
    float* const sums_B = shared<float>(p.shared.sums_B);
    const int trans = lane % 8 + lane / 16 * 8, other = lane / 8 % 2 * 8;
    const uint32_t from_slab = ptx::shared_address(slab + trans * kSlabPitch + other);
    const uint32_t from_A = ptx::shared_address(lora_A() + trans * kColumnPitch + warp_column + other);
    const uint32_t from_B = ptx::shared_address(lora_B() + (warp_row + lane % 16) * kRankPitch + lane / 16 * 8);
    uint32_t* const to_slab = reinterpret_cast<uint32_t*>(slab + lane / 4 * kSlabPitch + lane % 4 * 2);

    if (rank > 0) {
      stage_adapters(rank);
      __syncthreads();  // also: the last ranks' sums have been read
    }
    float grad_A[kTiles / 2][2][4] = {};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float grad_B[2][4] = {};
#pragma unroll
      for (int c = 0; c < kTiles / 2; ++c) {
        uint32_t g[3][4];
        split(g, sum, m, c);
        if (want_B)
          multiply_planes(grad_B, g, planes_A, [&](int plane, uint32_t (&b)[4]) {
            ptx::ldmatrix_x4(b, from_A + 2 * (plane * kExactRanks * kColumnPitch + 16 * c));
          });
        if (want_A) {
#pragma unroll
          for (int plane = 0; plane < 3; ++plane)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              ptx::store_shared(to_slab + (plane * kSlab + i % 2 * 8 * kSlabPitch + 16 * c + i / 2 * 8) / 2, g[plane][i]);
        }
      }
      if (want_B) store_sums(sums_B + warp_column / kWarpColumns * kExactRows * kExactRanks, warp_row + 16 * m, grad_B);
      if (want_A) {
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kTiles / 2; ++c) {
          uint32_t g[3][4];
#pragma unroll
          for (int plane = 0; plane < 3; ++plane) ptx::ldmatrix_x4_trans(g[plane], from_slab + 2 * (plane * kSlab + 16 * c));
          multiply_planes(grad_A[c], g, planes_B, [&](int plane, uint32_t (&b)[4]) {
            ptx::ldmatrix_x4_trans(b, from_B + 2 * (plane * kExactRows + 16 * m) * kRankPitch);
          });
        }
        __syncwarp();  // before the next rows take the slab
      }
    }
    __syncthreads();  // every slab has been read
    if (want_A) {
#pragma unroll
      for (int c = 0; c < kTiles / 2; ++c)
        store_sums(sums_A + warp_row / 64 * kColumns * kExactRanks, warp_column + 16 * c, grad_A[c]);
    }
    __syncthreads();
    if (want_A)
      write_sums<2, kColumns>(sums_A, rank, [&](int at) -> float* {
        const int64_t k = column() + column_of(at);
        if (k >= p.columns) return nullptr;
        return p.partial_A + ((int64_t{range} * p.row_tiles + row_tile) * p.columns + k) * p.width;
      });
    if (want_B)
      write_sums<4, kExactRows>(sums_B, rank, [&](int at) -> float* {
        const int64_t n = row() + at, rows = p.rows - p.first_row;
        if (n >= p.rows) return nullptr;
        return p.partial_B + ((int64_t{range} * p.column_tiles + column_tile) * rows + n - p.first_row) * p.width;
      });
  }
};

// All ranks, kExactRanks at a time. Each turn works out anew where its thread stands, from shuffles that the compiler cannot
// see through: else it keeps the addresses of every turn in registers, of which the sums leave too few.
template <typename Block>
__device__ __forceinline__ void contract_all(const ExactProblem& p, const typename Block::Sum& sum) {
  const int ranks = static_cast<int>(p.width);
#pragma unroll 1
  for (int rank = 0; rank < ranks; rank += kExactRanks) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Block(p, __shfl_sync(0xffffffffu, blockIdx.x, lane), __shfl_sync(0xffffffffu, threadIdx.x, lane)).contract(sum, rank);
  }
}

template <typename T, int kWarpColumns>
__global__ void __launch_bounds__(kExactThreads, 1) adapter_grad_exact_kernel(const ExactProblem p) {
  using Block = ExactBlock<T, kWarpColumns, false>;
  typename Block::Sum sum = {};
  Block(p, blockIdx.x, threadIdx.x).product(sum);
  contract_all<Block>(p, sum);
}

template <typename T>
__global__ void __launch_bounds__(kExactThreads, 1) masked_contract_kernel(const ExactProblem p) {
  using Block = ExactBlock<T, kExactNarrow / 4, true>;
  typename Block::Sum sum;
  Block(p, blockIdx.x, threadIdx.x).load(sum);
  contract_all<Block>(p, sum);
}

}  // namespace lors::cuda
