// SPDX-License-Identifier: Apache-2.0
// output[t, c] = round(sum_d activation[t, d] W~(c, d) + bias[c]), W~ = round(kept ? weight + scaling * lora_B lora_A : 0)
// with c, d = n, k in the forward pass and c, d = k, n in the input gradient; of experts, row t's. W~ is merged in registers,
// in the layout of an mma operand, and never in global memory. Launched by fused_linear.cu, which checks what the kernel cannot
// do.
#pragma once

#include "fused_linear_tiles.cuh"

namespace lors::cuda {

constexpr int kFusedThreads = 256;  // at most

// The steps of a block and the copies that each needs. A step is one part of the depth (depth_step) with one chunk of ranks;
// the weight and the activation are needed, and copied, with the last chunk.
template <typename T, int kTokens, bool kGradient, int kUnits>
struct FusedSteps {
  using Part = Unit<kGradient>;
  const FusedProblem& p;
  const FusedThread& t;
  uint8_t* shared;
  ExpertTile tile;
  int column_block, split;  // 32 bits, to save registers
  int count;

  __device__ __forceinline__ int64_t column() const { return int64_t{column_block} * p.config.columns; }

  __device__ __forceinline__ int64_t depth(int step) const {
    return (split * p.config.split_steps + step / p.config.rank_chunks) << p.config.depth_log2;
  }
  __device__ __forceinline__ int rank(int step) const { return step % p.config.rank_chunks * p.config.ranks; }
  __device__ __forceinline__ bool last(int step) const { return (step + 1) % p.config.rank_chunks == 0; }
  __device__ __forceinline__ uint8_t* stage(int step) const { return shared + step % p.config.stages * p.config.stage_bytes; }
  __device__ __forceinline__ uint8_t* terms(int step) const {
    return shared + p.config.terms_at + step % 2 * p.config.terms_bytes;
  }
  __device__ __forceinline__ uint8_t* slots(int step, int index) const {  // of all threads, for unit `index`
    const int vectors = p.weight_dtype == DType::float32 ? 2 : 1;
    return stage(step) + index * Part::kEights * vectors * p.config.threads * 16;
  }

  __device__ __forceinline__ void copy_adapter(int step) const {
    if (step >= 0 && step < count)
      copy_other<kGradient>(stage(step) + p.config.raw_at, p, tile.expert, depth(step), rank(step));
  }
  __device__ __forceinline__ void split_adapter(int step) const {
    if (step >= 0 && step < count) split_other<kGradient>(terms(step), stage(step) + p.config.raw_at, p);
  }
  // Everything that `step` needs except its adapter, and the adapter of the next step, which is split one step ahead.
  __device__ __forceinline__ void copy(int step) const {
    if (step >= 0 && step < count && last(step)) {
      const int threads = p.config.threads, size = p.weight_dtype == DType::float32 ? 4 : 2, vectors = size / 2;
      const int vector = vectors == 2 ? threadIdx.x % 2 : 0;
      const int64_t rows = kGradient ? p.depth : p.columns;
      const uint8_t* const weight = static_cast<const uint8_t*>(p.weight) + tile.expert * rows * p.in_features * size;
#pragma unroll 1
      for (int index = 0; index < kUnits; ++index) {
        uint8_t* slot = slots(step, index);
#pragma unroll
        for (int e = 0; e < Part::kEights; ++e, slot += threads * 16 * vectors) {
          for (int x = 0; x < vectors; ++x) {
            const int offset = vectors == 2 ? x - vector : 0;  // as in copy_other
            int64_t row, first;
            Part::where(row, first, t, t.q + offset, t.first_unit + index, e, column(), depth(step));
            copy_vector(slot + slot_of(threadIdx.x + offset, vector, threads), weight, size, row, p.in_features,
                        first + 4 * vector, row < rows ? p.in_features : 0, p.weight_vectors);
          }
        }
      }
      constexpr int kElements = 16 / sizeof(T);
      const int log2 = p.config.depth_log2 - (kElements == 8 ? 3 : 2);  // of the vectors in a row
      for (int task = threadIdx.x; task < kTokens << log2; task += threads) {
        const int row = task >> log2, v = task - (row << log2);
        copy_vector(activation_vector<T>(stage(step) + p.config.activation_at, row, v, p.config.depth_log2), p.activation,
                    sizeof(T), row < tile.rows ? gathered(p.experts.gather, tile.first + row) : 0, p.depth,
                    depth(step) + kElements * v, row < tile.rows ? p.depth : 0, p.activation_vectors);
      }
    }
    copy_adapter(step + 1);
    ptx::cp_async_commit();
  }

  // The mask of this thread's weights of one unit, a byte per group of eight. Loaded only when the unit is merged: earlier it
  // would need registers during the low-rank matmul.
  __device__ __forceinline__ uint32_t kept(int step, int index) const {
    uint32_t bits = 0;
    if (p.mask == nullptr || !last(step)) return bits;
    const int64_t rows = kGradient ? p.depth : p.columns;
    const uint8_t* const mask = p.mask + tile.expert * rows * p.mask_pitch;
#pragma unroll 1  // unrolled, the addresses do not fit the registers
    for (int i = 0; i < Part::kEights; ++i) {
      int64_t row, first;
      Part::where(row, first, t, t.q, t.first_unit + index, i, column(), depth(step));
      if (row < rows && first < p.in_features)
        bits |= static_cast<uint32_t>(ptx::load_global(mask + row * p.mask_pitch + first / 8)) << (8 * i);
    }
    return bits;
  }
};

// Waits until at most `pending` of this thread's groups are unfinished.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending <= 0)
    ptx::cp_async_wait<0>();
  else if (pending == 1)
    ptx::cp_async_wait<1>();
  else if (pending == 2)
    ptx::cp_async_wait<2>();
  else
    ptx::cp_async_wait<3>();
}

template <typename T, int kTokens, bool kGradient>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_linear_kernel(const FusedProblem p) {
  constexpr bool kWide = kTokens == kFusedWideTokens, kFloat = std::is_same_v<T, float>;
  constexpr int kTerms = kFloat ? 3 : 1, kUnits = (kGradient ? 2 : 4) / (kWide ? 2 : 1);
  constexpr int kTiles = kWide ? 4 : 8, kEights = kWide ? 8 : kTokens / 8;  // of tokens, per warp
  using Op = std::conditional_t<kFloat, bfloat16, T>;
  using Part = Unit<kGradient>;
  const FusedConfig& c = p.config;
  const FusedThread t(c, kUnits);
  uint8_t* const shared = ptx::dynamic_shared();
  uint8_t* const own = shared + c.own_at;

  const unsigned token_blocks = static_cast<unsigned>(c.token_blocks), splits = static_cast<unsigned>(c.splits);
  const unsigned block = blockIdx.x / token_blocks, split = block % splits;
  const ExpertTile tile = expert_tile(p.experts, p.tokens, kTokens, blockIdx.x % token_blocks);
  if (tile.rows == 0) return;
  // Rows without an expert: zeros, from no steps.
  const int64_t left =
      tile.expert == p.experts.count ? 0 : ((p.depth + c.depth_step - 1) >> c.depth_log2) - split * c.split_steps;
  const FusedSteps<T, kTokens, kGradient, kUnits> steps{
      p,
      t,
      shared,
      tile,
      static_cast<int>(block / splits),
      static_cast<int>(split),
      static_cast<int>(left < c.split_steps ? left : c.split_steps) * c.rank_chunks};

  float acc[4][kEights][4] = {};
  // Steps below 0 fill the pipeline.
  for (int step = -c.stages; step < steps.count; ++step) {
    wait_for_copies(c.stages - 2);
    __syncthreads();  // this step's copies and terms have arrived, and those of the last step have been read
    steps.copy(step + c.stages - 1);
    steps.split_adapter(step + 1);
    if (c.resident ? step == -1 && steps.count > 0 : step >= 0)
      stage_own<kGradient>(own, p, tile.expert, steps.column(), c.resident ? 0 : steps.rank(step));
    if (step < 0) continue;
    if (!c.resident) __syncthreads();

    uint32_t tiles[kTerms][kTiles][4];
#pragma unroll
    for (int index = 0; index < kUnits; ++index) {
      float sum[Part::kSums][4] = {};
      uint4* const sums = reinterpret_cast<uint4*>(shared + c.sums_at) + index * Part::kSums * c.threads + threadIdx.x;
      if (steps.rank(step) > 0) {
#pragma unroll
        for (int i = 0; i < Part::kSums; ++i) {
          const uint4 v = ptx::load_shared(sums + i * c.threads);
          sum[i][0] = __uint_as_float(v.x), sum[i][1] = __uint_as_float(v.y);
          sum[i][2] = __uint_as_float(v.z), sum[i][3] = __uint_as_float(v.w);
        }
      }
      Part::multiply(sum, p, t, t.first_unit + index, own, c.resident ? steps.rank(step) : 0, steps.terms(step));
      if (steps.last(step)) {
        Part::template merge<Op>(tiles, sum, p, index, steps.slots(step, index), steps.kept(step, index));
      } else {
#pragma unroll
        for (int i = 0; i < Part::kSums; ++i)
          ptx::store_shared(sums + i * c.threads, make_uint4(__float_as_uint(sum[i][0]), __float_as_uint(sum[i][1]),
                                                             __float_as_uint(sum[i][2]), __float_as_uint(sum[i][3])));
      }
    }
    if (!steps.last(step)) continue;

    uint8_t* const activation = steps.stage(step) + c.activation_at;
    if constexpr (!kWide) {
      multiply_activation<T, Op>(acc, tiles, activation, 0, t.depth_group, c.depth_log2, t.lane);
    } else {
      // Every warp has merged a part of W~; through shared memory each now gets all of 64 columns, for 64 tokens.
      uint4* const exchange = reinterpret_cast<uint4*>(shared + c.exchange_at) + t.lane;
      const int warp = threadIdx.x / kWarp, group = warp % c.column_warps, tokens = warp / c.column_warps * 64;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {  // forward: tile first_unit + i / 2, slice i % 2; gradient: tile i, slice first_unit
        const int at = kGradient ? 2 * i + t.first_unit : 2 * t.first_unit + i;
        ptx::store_shared(exchange + ((t.column_group * c.depth_warps + t.depth_group) * 8 + at) * kWarp,
                          make_vector(tiles[0][i]));
      }
      __syncthreads();
      if (tokens < tile.rows) {
        for (int d = 0; d < c.depth_warps; ++d) {
          uint32_t whole[1][8][4];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const uint4 v = ptx::load_shared(exchange + ((group * c.depth_warps + d) * 8 + i) * kWarp);
            whole[0][i][0] = v.x, whole[0][i][1] = v.y, whole[0][i][2] = v.z, whole[0][i][3] = v.w;
          }
          multiply_activation<T, Op>(acc, whole, activation, tokens, d, c.depth_log2, t.lane);
        }
      }
    }
  }

  ptx::cp_async_wait<0>();
  int group = t.column_group;
  int row = 0;
  if constexpr (kWide) {
    group = threadIdx.x / kWarp % c.column_warps;
    row = threadIdx.x / kWarp / c.column_warps * 64;
  } else {  // add up the warps that share columns, in fixed order
    __syncthreads();
    float4* const parts_of = reinterpret_cast<float4*>(shared) + group * kWarp + t.lane;
    const int warps = kWarp * c.column_warps;
    if (t.depth_group > 0) {
#pragma unroll
      for (int i = 0; i < 4 * kEights; ++i) {
        const float (&v)[4] = acc[i / kEights][i % kEights];
        ptx::store_shared(parts_of + ((t.depth_group - 1) * 4 * kEights + i) * warps, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
    __syncthreads();
    if (t.depth_group > 0) return;
    for (int d = 0; d + 1 < c.depth_warps; ++d) {
#pragma unroll
      for (int i = 0; i < 4 * kEights; ++i) {
        const float4 v = ptx::load_shared(parts_of + (d * 4 * kEights + i) * warps);
        float (&to)[4] = acc[i / kEights][i % kEights];
        to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
      }
    }
  }

  const int64_t at = steps.column() + 64 * group + 8 * t.g;
  float bias[8];
  load_eight(bias, p.bias, tile.expert, at);
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int of_tile = row + 8 * n + 2 * t.q + e;
      if (of_tile >= tile.rows) continue;
      const int64_t m = int64_t{tile.first} + of_tile;
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = acc[i / 2][n][i % 2 * 2 + e];
      if (p.partial != nullptr) {
        Eight<float> out;
        out.set(values);
        store_eight(p.partial + (int64_t{steps.split} * p.tokens + m) * p.partial_pitch, at, p.partial_pitch, true, out);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += bias[i];
        Eight<T> out;
        out.set(values);
        store_eight(static_cast<T*>(p.output) + m * p.columns, at, p.columns, p.output_vectors, out);
      }
    }
  }
}

}  // namespace lors::cuda
