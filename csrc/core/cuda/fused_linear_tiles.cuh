// SPDX-License-Identifier: Apache-2.0
// The pieces of fused_linear.cuh: copies of the operands to shared memory, the low-rank matmul lora_B lora_A, the merge of W~
// in registers, and the matmul of one step with the activation.
#pragma once

#include "experts.cuh"
#include "fused_linear_config.h"

namespace lors::cuda {

// Of one expert, where they are of several: the next one's matrices follow.
struct FusedProblem {
  const void* activation;  // [tokens, depth] row-major, of the kernel's type T
  const void* weight;      // [out_features, in_features] row-major, of weight_dtype
  const uint8_t* mask;     // [out_features, mask_pitch] bytes of bits, 1 = kept; null: kept where weight != 0
  int64_t mask_pitch;      // bytes from row to row of the mask
  Matrix own;              // lora_B [columns, r], or lora_A [r, columns] for the input gradient
  Matrix other;            // lora_A [r, depth], or lora_B [depth, r] for the input gradient
  Matrix bias;             // [experts, columns]; data null: none
  void* output;            // [tokens, columns] row-major, of type T; not written if `partial` is
  float* partial;          // [splits, tokens, partial_pitch]; null: the reduction is not split
  int64_t partial_pitch;
  int64_t tokens, columns, depth;
  int64_t in_features;  // the weight's pitch
  ExpertRows experts;
  float scaling;
  DType weight_dtype;
  bool weight_vectors, activation_vectors, output_vectors;
  FusedConfig config;
};

// In one step a warp has 64 columns x 32 depths of W~ as eight mma operands of 16 x 16. Lane 4 g + q holds columns
// 8 g + 2 i + h of tile i and depths 8 q + 4 s + e of slice s: in this order each 16-byte vector of the weight, the activation
// and the output belongs to one thread, forward and transposed. The operands of the low-rank matmul are stored to shared memory
// in the same order; a permutation of the depths does not matter as long as both operands have it.
struct FusedThread {
  int lane, g, q;
  int column_group, depth_group;  // of the 64 columns, of the 32 depths
  int first_unit;                 // two warps share a group in the wide tile

  __device__ __forceinline__ explicit FusedThread(const FusedConfig& c, int units) {
    const int warp = threadIdx.x / kWarp, groups = c.column_warps * c.depth_warps;
    lane = threadIdx.x % kWarp;
    g = lane / 4;
    q = lane % 4;
    column_group = warp % c.column_warps;
    depth_group = warp % groups / c.column_warps;
    first_unit = warp / groups * units;
  }
};

__device__ __forceinline__ uint4 make_vector(const uint32_t (&word)[4]) {
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Copies 16 bytes of a matrix of `size`-byte elements, from element [row, column] on, to shared memory; zeros beyond the end of
// the row, which has `columns` elements. By cp.async where rows are aligned.
__device__ __forceinline__ void copy_vector(uint8_t* to, const void* data, int size, int64_t row, int64_t pitch, int64_t column,
                                            int64_t columns, bool vectors) {
  const uint8_t* const from = static_cast<const uint8_t*>(data) + (row * pitch + column) * size;
  if (vectors) {
    const bool inside = column < columns;
    ptx::cp_async_16(ptx::shared_address(to), inside ? from : data, inside ? 16 : 0);
    return;
  }
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (size == 4) {
      if (column + i < columns) word[i] = ptx::load_global(reinterpret_cast<const uint32_t*>(from) + i);
    } else {
      const uint16_t* const halves = reinterpret_cast<const uint16_t*>(from) + 2 * i;
      if (column + 2 * i < columns) word[i] = ptx::load_global(halves);
      if (column + 2 * i + 1 < columns) word[i] |= static_cast<uint32_t>(ptx::load_global(halves + 1)) << 16;
    }
  }
  ptx::store_shared(reinterpret_cast<uint4*>(to), make_vector(word));
}

// Each thread's eight elements take one 16-byte slot of shared memory, or two for float32. There a pair of lanes copies the
// elements of both together, so that each copy reads a whole 32-byte sector: lane % 2 is the vector it copies, for either
// thread. The second slots are swapped within the pair, against bank conflicts.
__device__ __forceinline__ int slot_of(int thread, int vector, int threads) {
  return 16 * (vector * threads + (thread ^ vector));
}

// This thread's eight elements as float32. `slots`: those of all threads.
__device__ __forceinline__ void read_eight(float (&values)[8], DType dtype, const uint8_t* slots, int threads) {
  const int thread = threadIdx.x;
  const uint4 low = ptx::load_shared(reinterpret_cast<const uint4*>(slots + slot_of(thread, 0, threads)));
  if (dtype == DType::float32)
    Eight<float>{{low, ptx::load_shared(reinterpret_cast<const uint4*>(slots + slot_of(thread, 1, threads)))}}.get(values);
  else if (dtype == DType::bfloat16)
    Eight<bfloat16>{{low}}.get(values);
  else
    Eight<float16>{{low}}.get(values);
}

// The address of vector `v` of a row of the activation, swizzled so that the 16-byte reads of a quarter of a warp, two rows x
// four lanes, have no bank conflicts.
template <typename T>
__device__ __forceinline__ uint8_t* activation_vector(uint8_t* stage, int row, int v, int depth_log2) {
  const int swizzled = sizeof(T) == 4 ? v ^ (row & 1) : v ^ (row & 1) << 2;
  return stage + ((row << depth_log2) * static_cast<int>(sizeof(T)) + 16 * swizzled);
}

// A matrix [r, columns] transposed as the first operands of mma: ranks [rank, rank + ranks), `columns` columns from `column`
// on, as terms [ranks / 16][columns / 16][lane], the four registers of each lane together. Columns as in FusedThread.
__device__ __forceinline__ void stage_fragments(uint4* to, const Matrix& m, int64_t rank, int64_t column, int ranks,
                                                int columns) {
  const int lane = threadIdx.x % kWarp, groups = columns / kFusedWarpColumns, count = split_terms(m.dtype);
  for (int task = threadIdx.x / kWarp; task < ranks / 16 * groups; task += blockDim.x / kWarp) {
    const int slice = task / groups, group = task % groups;
    float values[4][8];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      load_eight(values[e], m, rank + 16 * slice + 2 * (lane % 4) + e % 2 + e / 2 * 8, column + 64 * group + lane / 4 * 8);
    for (int term = 0; term < count; ++term) {
      uint4* at = to + ((term * (ranks / 16) + slice) * groups + group) * 4 * kWarp + lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          word[j] = next_term_pair(values[j / 2 * 2][2 * i + j % 2], values[j / 2 * 2 + 1][2 * i + j % 2]);
        ptx::store_shared(at + i * kWarp, make_vector(word));
      }
    }
  }
}

// `own` as the first operand of the low-rank matmul, ranks [rank, rank + own_ranks), for this block's columns.
// Forward: terms [columns][own_ranks + pad], column 8 g + 2 i + h of a group of 64 in row 16 i + 8 h + g.
// Input gradient: see stage_fragments.
template <bool kGradient>
__device__ __forceinline__ void stage_own(uint8_t* to, const FusedProblem& p, int expert, int64_t column, int64_t rank) {
  const Matrix m = of_expert(p.own, expert);
  const int columns = p.config.columns, ranks = p.config.own_ranks;
  if constexpr (kGradient) {
    stage_fragments(reinterpret_cast<uint4*>(to), m, rank, column, ranks, columns);
  } else {
    const int pitch = ranks + kFusedPad, eights = ranks / 8, count = split_terms(m.dtype);
    for (int task = threadIdx.x; task < columns * eights; task += blockDim.x) {
      const int row = task / (8 * eights) * 8 + task % 8, r8 = task / 8 % eights * 8;
      float values[8];
      load_eight(values, m, column + row / 64 * 64 + row % 8 * 8 + row % 64 / 8, rank + r8);
      for (int term = 0; term < count; ++term) {
        const uint4 packed = next_terms(values);
        ptx::store_shared(reinterpret_cast<uint4*>(to) + ((term * columns + row) * pitch + r8) / 8, packed);
      }
    }
  }
}

// `other` takes two steps: copy_other copies it unchanged to the threads' slots, split_other splits it from there into the
// second operand of the low-rank matmul. Forward: terms [ranks][depth step + pad], within 32 depths the pair at 8 q + 2 j
// at 8 j + 2 q. Input gradient: terms [depth step][ranks + pad], rows in the same order.
template <bool kGradient>
struct OtherTask {
  int r, d;  // forward: rank and first of 8 depths; input gradient: first of 8 ranks and depth
  int at;    // element of a term
  __device__ __forceinline__ OtherTask(int task, const FusedConfig& c) {
    if constexpr (kGradient) {
      const int eights = c.ranks / 8, octet = task / (8 * eights), x = task % 8;
      r = task / 8 % eights * 8;
      d = octet / 4 * 32 + x / 2 * 8 + octet % 4 * 2 + x % 2;
      at = (octet * 8 + x) * (c.ranks + kFusedPad) + r;
    } else {
      const int groups = c.depth_step / 32, lane = task % kWarp;
      const int group = task / kWarp % groups * 32;
      r = task / kWarp / groups * 8 + lane / 4;
      d = group + lane % 4 * 8;
      at = r * (c.depth_step + kFusedPad) + group + lane % 4 * 2;
    }
  }
};

template <bool kGradient>
__device__ __forceinline__ void copy_other(uint8_t* raw, const FusedProblem& p, int expert, int64_t depth, int64_t rank) {
  const FusedConfig& c = p.config;
  const Matrix m = of_expert(p.other, expert);
  const int tasks = c.ranks * c.depth_step / 8, size = m.dtype == DType::float32 ? 4 : 2, vectors = size / 2;
  const int vector = vectors == 2 ? threadIdx.x % 2 : 0;
  for (int task = threadIdx.x; task < tasks; task += c.threads, raw += c.threads * 16 * vectors) {
    for (int x = 0; x < vectors; ++x) {
      const int offset = vectors == 2 ? x - vector : 0;  // to this lane or the other of its pair: see slot_of
      const OtherTask<kGradient> t(task + offset, c);
      const int64_t row = kGradient ? depth + t.d : rank + t.r, column = kGradient ? rank + t.r : depth + t.d;
      copy_vector(raw + slot_of(threadIdx.x + offset, vector, c.threads), m.data, size, row, m.columns, column + 4 * vector,
                  row < m.rows ? m.columns : 0, m.vectors);
    }
  }
}

template <bool kGradient>
__device__ __forceinline__ void split_other(uint8_t* terms, const uint8_t* raw, const FusedProblem& p) {
  const FusedConfig& c = p.config;
  const int tasks = c.ranks * c.depth_step / 8, vectors = p.other.dtype == DType::float32 ? 2 : 1;
  const int count = split_terms(p.other.dtype), term_bytes = c.terms_bytes / count;
  for (int task = threadIdx.x; task < tasks; task += c.threads, raw += c.threads * 16 * vectors) {
    const OtherTask<kGradient> t(task, c);
    float values[8];
    read_eight(values, p.other.dtype, raw, c.threads);
    uint8_t* to = terms + 2 * t.at;
    for (int term = 0; term < count; ++term, to += term_bytes) {
      const uint4 packed = next_terms(values);
      if constexpr (kGradient) {
        ptx::store_shared(reinterpret_cast<uint4*>(to), packed);
      } else {
        const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::store_shared(reinterpret_cast<uint32_t*>(to + 16 * j), word[j]);
      }
    }
  }
}

// What a warp merges at a time. Forward: tile i = unit and both slices of depth, from rows h of the weight. Input gradient:
// slice s = unit and all four tiles, from rows e of the weight.
template <bool kGradient>
struct Unit {
  static constexpr int kEights = kGradient ? 4 : 2;  // groups of eight weights per thread
  static constexpr int kSums = kGradient ? 8 : 4;    // accumulators (16 x 8) of the low-rank matmul

  // sum += the low-rank matmul over c.ranks ranks. sum[j][2 h + e]: forward column 2 unit + h, depth 2 j + e;
  // input gradient sum[2 i + j][2 h + e]: column 2 i + h, depth 4 unit + 2 j + e.
  static __device__ __forceinline__ void multiply(float (&sum)[kSums][4], const FusedProblem& p, const FusedThread& t, int unit,
                                                  const uint8_t* own, int own_rank, const uint8_t* other) {
    const FusedConfig& c = p.config;
    const int terms_own = split_terms(p.own.dtype), terms_other = split_terms(p.other.dtype);
    if constexpr (kGradient) {
      const int pitch = c.ranks + kFusedPad, term = c.depth_step * pitch;
      const uint32_t from = ptx::shared_address(other) +
                            2 * ((32 * t.depth_group + 16 * unit + t.lane / 16 * 8 + t.lane % 8) * pitch + t.lane / 8 % 2 * 8);
      const uint4* tiles = reinterpret_cast<const uint4*>(own) + 4 * kWarp * t.column_group + t.lane;
      for (int r = 0; r < c.ranks; r += 16) {
        // One term of this operand at a time: all of them do not fit the registers beside `sum` and the accumulators.
#pragma unroll
        for (int j = 0; j < kMaxTerms; ++j) {
          if (j >= terms_other) break;
          uint32_t b[4];
          ptx::ldmatrix_x4(b, from + 2 * (j * term + r));
#pragma unroll
          for (int i = 0; i + j < kMaxTerms; ++i) {
            if (i >= terms_own) break;
            const uint4* at = tiles + (i * (c.own_ranks / 16) + (own_rank + r) / 16) * 4 * kWarp * c.column_warps;
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
              const uint4 v = ptx::load_shared(at + tile * kWarp);
              const uint32_t a[4] = {v.x, v.y, v.z, v.w};
              ptx::mma_m16n8k16<bfloat16>(sum[2 * tile], a, b[0], b[1]);
              ptx::mma_m16n8k16<bfloat16>(sum[2 * tile + 1], a, b[2], b[3]);
            }
          }
        }
      }
    } else {
      const int pitch = c.depth_step + kFusedPad, pitch_own = c.own_ranks + kFusedPad;
      const uint32_t from = ptx::shared_address(other) + 2 * (t.lane % 16 * pitch + 32 * t.depth_group + t.lane / 16 * 8);
      const uint32_t from_own = ptx::shared_address(own) +
                                2 * ((64 * t.column_group + 16 * unit + t.lane % 16) * pitch_own + own_rank + t.lane / 16 * 8);
      for (int r = 0; r < c.ranks; r += 16) {
        uint32_t a[kMaxTerms][4];
#pragma unroll
        for (int i = 0; i < kMaxTerms; ++i)
          if (i < terms_own) ptx::ldmatrix_x4(a[i], from_own + 2 * (i * c.columns * pitch_own + r));
#pragma unroll
        for (int i = 0; i < kMaxTerms; ++i) {
          if (i >= terms_other) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, from + 2 * ((i * c.ranks + r) * pitch + 16 * half));
#pragma unroll
            for (int j = 0; j < kMaxTerms; ++j) {
              if (i + j >= kMaxTerms || j >= terms_own) break;
              ptx::mma_m16n8k16<bfloat16>(sum[2 * half], a[j], b[0], b[1]);
              ptx::mma_m16n8k16<bfloat16>(sum[2 * half + 1], a[j], b[2], b[3]);
            }
          }
        }
      }
    }
  }

  // Row and first column of the weight's group of eight `e` that lane 4 g + q merges; the block starts at column, depth.
  static __device__ __forceinline__ void where(int64_t& row, int64_t& first, const FusedThread& t, int q, int unit, int e,
                                               int64_t column, int64_t depth) {
    const int64_t c = column + 64 * t.column_group + 8 * t.g, d = depth + 32 * t.depth_group + 8 * q;
    row = kGradient ? d + 4 * unit + e : c + 2 * unit + e;
    first = kGradient ? c : d;
  }

  // Merges the unit's weights into the warp's operands [tile][slice]. `kept`: the mask, a byte per group of eight; without a
  // mask, nonzero weights are kept.
  template <typename Op, int kTerms, int kTotal>
  static __device__ __forceinline__ void merge(uint32_t (&tiles)[kTerms][kTotal][4], const float (&sum)[kSums][4],
                                               const FusedProblem& p, int index, const uint8_t* slots, uint32_t kept) {
    const int vectors = p.weight_dtype == DType::float32 ? 2 : 1, step = p.config.threads * 16;
    float values[2][8];
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      read_eight(values[e % 2], p.weight_dtype, slots + e * vectors * step, p.config.threads);
      const uint32_t bits = kept >> (8 * e);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& v = values[e % 2][i];
        const float low_rank = kGradient ? sum[i / 2 * 2 + e / 2][i % 2 * 2 + e % 2] : sum[i / 2][2 * e + i % 2];
        const bool keep = p.mask != nullptr ? bits >> i & 1 : v != 0.f;
        v = keep ? fmaf(p.scaling, low_rank, v) : 0.f;
      }
      if constexpr (!kGradient) {  // depths 2 j and 2 j + 1 of row h = e
#pragma unroll
        for (int j = 0; j < 4; ++j)
          set<Op, kTerms>(tiles, 2 * index + j / 2, e + j % 2 * 2, values[e % 2][2 * j], values[e % 2][2 * j + 1]);
      } else if (e % 2 == 1) {  // columns 2 i + h of rows e - 1 and e
#pragma unroll
        for (int i = 0; i < 8; ++i)
          set<Op, kTerms>(tiles, i / 2 * (kTotal / 4) + index, i % 2 + e / 2 * 2, values[0][i], values[1][i]);
      }
    }
  }

 private:
  template <typename Op, int kTerms, int kTotal>
  static __device__ __forceinline__ void set(uint32_t (&tiles)[kTerms][kTotal][4], int tile, int reg, float low, float high) {
    if constexpr (kTerms == 1) {
      tiles[0][tile][reg] = rounded_pair<Op>(low, high);
    } else {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) tiles[term][tile][reg] = next_term_pair(low, high);
    }
  }
};

// acc[tile][8 tokens] += tiles x activation, over the 32 depths of group `depth_group`, tokens from row `token` of the stage
// on.
template <typename T, typename Op, int kTerms, int kEights>
__device__ __forceinline__ void multiply_activation(float (&acc)[4][kEights][4], const uint32_t (&tiles)[kTerms][8][4],
                                                    uint8_t* stage, int token, int depth_group, int depth_log2, int lane) {
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const int row = token + 8 * n + lane / 4, v = (4 * depth_group + lane % 4) * Eight<T>::kVectors;
    uint32_t b[kTerms][4];
    const uint4 low = ptx::load_shared(reinterpret_cast<const uint4*>(activation_vector<T>(stage, row, v, depth_log2)));
    if constexpr (kTerms == 1) {
      b[0][0] = low.x, b[0][1] = low.y, b[0][2] = low.z, b[0][3] = low.w;
    } else {
      const uint4 high = ptx::load_shared(reinterpret_cast<const uint4*>(activation_vector<T>(stage, row, v + 1, depth_log2)));
      float values[8];
      Eight<float>{{low, high}}.get(values);
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
#pragma unroll
        for (int j = 0; j < 4; ++j) b[term][j] = next_term_pair(values[2 * j], values[2 * j + 1]);
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      if constexpr (kTerms == 1) {
#pragma unroll
        for (int slice = 0; slice < 2; ++slice)
          ptx::mma_m16n8k16<Op>(acc[tile][n], tiles[0][2 * tile + slice], b[0][2 * slice], b[0][2 * slice + 1]);
      } else {
        // A sum of its own, small terms first: the long sum is then rounded once per 32 depths, not twelve times, and to
        // nearest, which tensor cores do not promise.
        float sum[4] = {};
#pragma unroll
        for (int order = kTerms - 1; order >= 0; --order)
#pragma unroll
          for (int i = 0; i <= order; ++i)
#pragma unroll
            for (int slice = 0; slice < 2; ++slice)
              ptx::mma_m16n8k16<Op>(sum, tiles[i][2 * tile + slice], b[order - i][2 * slice], b[order - i][2 * slice + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[tile][n][i] += sum[i];
      }
    }
  }
}

}  // namespace lors::cuda
