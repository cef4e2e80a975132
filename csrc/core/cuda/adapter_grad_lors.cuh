// SPDX-License-Identifier: Apache-2.0
// One pass over Z [tokens, features], which is dY or X, each element read once for both matmuls:
//   projected[t, p] = sum_f Z[t, f] factor[f, p]        reduced[f, p] = sum_t Z[t, f] token_factor[t, p]
// Blocks write partial sums, which reduce.cuh adds up. Launched by adapter_grad_lors.cu; more than 64 ranks take several
// passes.
#pragma once

#include "adapter_grad_lors_config.h"
#include "operands.cuh"

namespace lors::cuda {

struct TokenFeatures {
  const void* z = nullptr;  // [tokens, features] row-major, of the kernel's type Z
  bool z_vectors = false;   // its rows can be read 16 bytes at a time
  int64_t tokens = 0;
  int64_t features = 0;
  Matrix factor;                              // lora_B [features, r], or lora_A [r, features] where `factor_by_rank`
  bool factor_by_rank = false;                // which of the two layouts
  int64_t rank = 0;                           // the first rank of this pass
  int64_t width = 0;                          // ranks of this pass rounded up to a multiple of 4: the pitch of the three below
  const float* token_factor = nullptr;        // P or Q [tokens, width], the projection of another pass
  float* projected = nullptr;                 // [tiles, tokens, width], partial sums
  float* reduced = nullptr;                   // [ranges, features, width], partial sums
  int64_t tiles = 0;                          // of features, one per block
  int64_t range_tokens = 0;                   // per block
  int warp_groups = 0, group_warps = 0;       // per block, and warps of a group
  int tile_features = 0, feature_groups = 0;  // TokenTile::features and feature_groups
  TokenShared shared;
};

// Offset of element [row, column] in a tile with rows of kRanks 16-bit elements. The 16-byte units of each row are permuted so
// that the same unit of eight rows lies in eight different groups of banks.
template <int kRanks>
__device__ __forceinline__ int swizzled(int row, int column) {
  return row * kRanks + ((column / 8) ^ (row / (64 / kRanks) % (kRanks / 8))) * 8 + column % 8;
}

// The same for rows of kRanks floats, accessed in pairs and fours.
template <int kRanks>
__device__ __forceinline__ int swizzled_floats(int row, int column) {
  return row * kRanks + (column ^ (kRanks == 16 ? row / 2 % 2 : row % 4) * 8);
}

// One block. Its warp groups have the same features and take the steps in round-robin order. What one warp does follows from
// kRanks and Z (kTile); the number of warps in a group sets its number of features.
template <typename Z, int kRanks>
struct TokenBlock {
  static constexpr int kTerms = split_terms(dtype_of<Z>());
  static constexpr TokenTile kTile = token_tile(kRanks, kTerms);
  static constexpr int kTokens = kTile.tokens;
  static constexpr bool kAsync = kTerms == 1;  // bfloat16 needs no splitting: copied by cp.async
  static constexpr int kRankPairs = kTile.reduce_ranks / 16;
  static constexpr int kProjectTokens = kTokens / 16 / kTile.token_groups;
  static constexpr int kRowsPerLoad = kMaxTokenWarps * kTile.rank_groups / static_cast<int>(sizeof(Z));
  static constexpr int kLoads = kTokens / kRowsPerLoad;  // 16-byte vectors of Z per thread and step
  static constexpr int kTokenFactorLoads = (kTokens * kRanks / 4 + kTile.min_warps * kWarp - 1) / (kTile.min_warps * kWarp);

  const TokenFeatures& p;
  int warp_group, threads, thread;  // this thread's warp group, the group's size, the thread's index in it
  int features, pitch, z_size;      // of the tile; elements of a row of it; elements of a stage
  uint16_t *z, *token_factor, *factor;
  float* projected;
  int64_t tile, first_feature, first_token, end_token;

  __device__ __forceinline__ explicit TokenBlock(const TokenFeatures& problem) : p(problem) {
    threads = p.group_warps * kWarp;
    warp_group = threadIdx.x / threads;
    thread = threadIdx.x % threads;
    features = p.tile_features;
    pitch = features + kTokenFeaturePad;
    z_size = kTerms * kTokens * pitch;
    uint8_t* const base = ptx::dynamic_shared() + warp_group * p.shared.warp_group;
    z = reinterpret_cast<uint16_t*>(base);
    token_factor = reinterpret_cast<uint16_t*>(base + p.shared.z);
    projected = reinterpret_cast<float*>(base + p.shared.z + p.shared.token_factor);
    factor = reinterpret_cast<uint16_t*>(ptx::dynamic_shared() + p.warp_groups * p.shared.warp_group);
    tile = blockIdx.x % p.tiles;
    first_feature = tile * features;
    first_token = blockIdx.x / p.tiles * p.range_tokens;
    end_token = first_token + p.range_tokens < p.tokens ? first_token + p.range_tokens : p.tokens;
  }

  __device__ __forceinline__ int steps() const {
    return static_cast<int>((end_token - first_token + kTokens * p.warp_groups - 1) / (kTokens * p.warp_groups));
  }
  __device__ __forceinline__ int64_t step_token(int step) const {
    return first_token + (int64_t{step} * p.warp_groups + warp_group) * kTokens;
  }
  __device__ __forceinline__ uint16_t* z_stage(int step) const { return z + step % kTile.stages * z_size; }
  __device__ __forceinline__ uint16_t* token_factor_stage(int step) const {
    return token_factor + step % 2 * (kTokenFactorTerms * kTokens * kRanks);
  }
  __device__ __forceinline__ float* projected_stage(int step) const {
    return projected + step % 2 * (p.feature_groups * kTokens * kRanks);
  }

  // The first of the thread's 16-byte vectors of a step of Z; the others follow kRowsPerLoad tokens apart.
  __device__ __forceinline__ int z_row() const { return thread / (features / kVectorElements<Z>); }
  __device__ __forceinline__ int z_column() const { return thread % (features / kVectorElements<Z>)*kVectorElements<Z>; }
  __device__ __forceinline__ uint16_t* z_place(int step) const { return z_stage(step) + z_row() * pitch + z_column(); }

  // Starts loading the step's rows of Z, by cp.async to shared memory or into `held`. Zeros beyond the last token.
  __device__ __forceinline__ void fetch_z(uint4 (&held)[kLoads], int step) const {
    if (!p.z_vectors) {
      if constexpr (kAsync) copy_unaligned(step);
      return;
    }
    const int64_t token = step_token(step) + z_row(), column = first_feature + z_column();
    const int64_t left = column < p.features ? end_token - token : 0;
    const Z* const from = static_cast<const Z*>(p.z) + token * p.features + column;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool inside = i * kRowsPerLoad < left;
      const void* const vector = inside ? from + i * kRowsPerLoad * p.features : p.z;
      if constexpr (kAsync) {
        ptx::cp_async_16(ptx::shared_address(z_place(step) + i * kRowsPerLoad * pitch), vector, inside ? 16 : 0);
      } else {
        held[i] = make_uint4(0, 0, 0, 0);
        if (inside) held[i] = ptx::load_global_once(static_cast<const uint4*>(vector));
      }
    }
    if constexpr (kAsync) ptx::cp_async_commit();
  }

  // Stores the step's rows to shared memory where fetch_z has not.
  __device__ __forceinline__ void put_z(const uint4 (&held)[kLoads], int step) const {
    if constexpr (kAsync) return;
    if (!p.z_vectors) return copy_unaligned(step);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store_terms<Z>(z_place(step) + i * kRowsPerLoad * pitch, kTokens * pitch, held[i]);
  }

  __device__ __forceinline__ void copy_unaligned(int step) const {
    const int64_t token = step_token(step) + z_row();
    const Z* const from = static_cast<const Z*>(p.z) + token * p.features;
#pragma unroll 1
    for (int row = 0; row < kTokens; row += kRowsPerLoad)
      store_terms<Z>(
          z_place(step) + row * pitch, kTokens * pitch,
          gather_vector(from + row * p.features, first_feature + z_column(), token + row < end_token ? p.features : 0));
  }

  // Token and ranks of the thread's i-th vector of the token factor; eight lanes take eight tokens, against bank conflicts.
  __device__ __forceinline__ bool token_factor_place(int i, int& row, int& column) const {
    const int task = i * threads + thread;
    row = task / (2 * kRanks) * 8 + task % 8;
    column = task / 8 % (kRanks / 4) * 4;
    return task < kTokens * kRanks / 4;
  }

  __device__ __forceinline__ void fetch_token_factor(float4 (&held)[kTokenFactorLoads], int step) const {
#pragma unroll
    for (int i = 0; i < kTokenFactorLoads; ++i) {
      int row, column;
      const bool mine = token_factor_place(i, row, column);
      const int64_t token = step_token(step) + row;
      held[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (mine && token < end_token && column < p.width)
        held[i] = ptx::load_global(reinterpret_cast<const float4*>(p.token_factor + token * p.width + column));
    }
  }

  __device__ __forceinline__ void put_token_factor(const float4 (&held)[kTokenFactorLoads], int step) const {
#pragma unroll
    for (int i = 0; i < kTokenFactorLoads; ++i) {
      int row, column;
      if (!token_factor_place(i, row, column)) continue;
      const uint4 bits = make_uint4(__float_as_uint(held[i].x), __float_as_uint(held[i].y), __float_as_uint(held[i].z),
                                    __float_as_uint(held[i].w));
      store_terms<float>(token_factor_stage(step) + swizzled<kRanks>(row, column), kTokens * kRanks, bits);
    }
  }

  // The tile's part of the factor, in the order it has in memory: [features][ranks] swizzled, or [ranks][pitch].
  __device__ __forceinline__ void stage_factor() const {
    const int terms = split_terms(p.factor.dtype);
    for (int task = threadIdx.x; task < features * kRanks / 8; task += blockDim.x) {
      float values[8];
      int at;
      if (p.factor_by_rank) {
        const int rank = task / (features / 8), feature = task % (features / 8) * 8;
        load_eight(values, p.factor, p.rank + rank, first_feature + feature);
        at = rank * pitch + feature;
      } else {
        const int feature = task / kRanks * 8 + task % 8, rank = task / 8 % (kRanks / 8) * 8;
        load_eight(values, p.factor, first_feature + feature, p.rank + rank);
        at = swizzled<kRanks>(feature, rank);
      }
      for (int term = 0; term < terms; ++term) {
        const uint4 packed = next_terms(values);
        ptx::store_shared(reinterpret_cast<uint4*>(factor + term * kRanks * pitch + at), packed);
      }
    }
  }

  // Z factor over this warp's features, for its tokens and 16 ranks, to shared memory; write_projected adds up the warps.
  __device__ __forceinline__ void project(int step) const {
    const int lane = threadIdx.x % kWarp, warp = thread / kWarp;
    const int token = warp % kTile.token_groups * (16 * kProjectTokens);
    const int rank = warp / kTile.token_groups % (kRanks / 16) * 16;
    const int group = warp / (kTile.token_groups * (kRanks / 16));
    const int terms = split_terms(p.factor.dtype), by_rank = p.factor_by_rank;
    const int feature = group * kTile.feature_span;
    const uint32_t from_z = ptx::shared_address(z_stage(step) + (token + lane % 16) * pitch + feature + lane / 16 * 8);
    const int at = by_rank ? (rank + lane % 8 + lane / 16 * 8) * pitch + feature + lane / 8 % 2 * 8
                           : swizzled<kRanks>(feature + lane % 16, rank + lane / 16 * 8);
    const uint32_t from_factor = ptx::shared_address(factor + at);
    const int factor_step = 2 * (by_rank ? 1 : kRanks);  // bytes from feature to feature

    float sum[kProjectTokens][2][4] = {};
#pragma unroll 1
    for (int k = 0; k < kTile.feature_span; k += 16) {
      uint32_t a[kProjectTokens][kTerms][4];
#pragma unroll
      for (int m = 0; m < kProjectTokens; ++m)
#pragma unroll
        for (int i = 0; i < kTerms; ++i) ptx::ldmatrix_x4(a[m][i], from_z + 2 * ((i * kTokens + 16 * m) * pitch + k));
#pragma unroll 1
      for (int j = terms - 1; j >= 0; --j) {  // small terms first
        uint32_t b[4];
        const uint32_t from = from_factor + 2 * j * kRanks * pitch + k * factor_step;
        if (by_rank)
          ptx::ldmatrix_x4(b, from);
        else
          ptx::ldmatrix_x4_trans(b, from);
#pragma unroll
        for (int i = kTerms - 1; i >= 0; --i) {
          if (i + j >= kMaxTerms) continue;
#pragma unroll
          for (int m = 0; m < kProjectTokens; ++m) {
            ptx::mma_m16n8k16<bfloat16>(sum[m][0], a[m][i], b[0], b[1]);
            ptx::mma_m16n8k16<bfloat16>(sum[m][1], a[m][i], b[2], b[3]);
          }
        }
      }
    }
    float* const to = projected_stage(step) + group * kTokens * kRanks;
#pragma unroll
    for (int m = 0; m < kProjectTokens; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          ptx::store_shared(reinterpret_cast<float2*>(
                                to + swizzled_floats<kRanks>(token + 16 * m + lane / 4 + 8 * h, rank + 8 * n + lane % 4 * 2)),
                            make_float2(sum[m][n][2 * h], sum[m][n][2 * h + 1]));
  }

  // The sum of the warps' results of project(step), in fixed order, to global memory.
  __device__ __forceinline__ void write_projected(int step) const {
    const float* const from = projected_stage(step);
    for (int task = thread; task < kTokens * kRanks / 4; task += threads) {
      const int row = task / (kRanks / 4), column = task % (kRanks / 4) * 4;
      const int64_t token = step_token(step) + row;
      if (token >= end_token || column >= p.width) continue;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int group = 0; group < p.feature_groups; ++group) {
        const float4 part = ptx::load_shared(
            reinterpret_cast<const float4*>(from + group * kTokens * kRanks + swizzled_floats<kRanks>(row, column)));
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      ptx::store_global(reinterpret_cast<float4*>(p.projected + (tile * p.tokens + token) * p.width + column), sum);
    }
  }

  // sum[m][n][2 h + e]: feature 16 m + lane / 4 + 8 h of the warp's 64, rank 8 n + 2 (lane % 4) + e of its reduce_ranks.
  using Reduced = float[4][2 * kRankPairs][4];

  __device__ __forceinline__ int reduce_feature() const { return thread / kWarp / kTile.rank_groups * 64; }
  __device__ __forceinline__ int reduce_rank() const { return thread / kWarp % kTile.rank_groups * kTile.reduce_ranks; }

  // total += Z^T token_factor of the step. Sixteen tokens have a sum of their own, small terms first: the total is then rounded
  // once per sixteen tokens, and to nearest, which tensor cores do not promise.
  __device__ __forceinline__ void reduce(Reduced& total, int step) const {
    const int lane = threadIdx.x % kWarp, rank = reduce_rank();
    const uint32_t from_z =
        ptx::shared_address(z_stage(step) + (lane % 8 + lane / 16 * 8) * pitch + reduce_feature() + lane / 8 % 2 * 8);
    const uint32_t from_token_factor =
        ptx::shared_address(token_factor_stage(step) + swizzled<kRanks>(lane % 16, rank + lane / 16 * 8));
#pragma unroll 1  // the totals fill the registers
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t b[kRankPairs][kTokenFactorTerms][4];
#pragma unroll
      for (int q = 0; q < kRankPairs; ++q)
#pragma unroll
        for (int j = 0; j < kTokenFactorTerms; ++j)
          // 16 ranks further flips bit 1 of the unit's index, in swizzled order too.
          ptx::ldmatrix_x4_trans(b[q][j], (from_token_factor ^ (32 * q)) + 2 * (j * kTokens + t) * kRanks);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float sum[2 * kRankPairs][4] = {};
        uint32_t a[kTerms][4];
#pragma unroll
        for (int i = 0; i < kTerms; ++i) ptx::ldmatrix_x4_trans(a[i], from_z + 2 * ((i * kTokens + t) * pitch + 16 * m));
#pragma unroll
        for (int order = kMaxTerms - 1; order >= 0; --order)
#pragma unroll
          for (int i = 0; i < kTerms; ++i) {
            if (i > order) continue;
#pragma unroll
            for (int n = 0; n < 2 * kRankPairs; ++n) {
              const uint32_t (&of)[4] = b[n / 2][order - i];
              ptx::mma_m16n8k16<bfloat16>(sum[n], a[i], of[n % 2 * 2], of[n % 2 * 2 + 1]);
            }
          }
#pragma unroll
        for (int n = 0; n < 2 * kRankPairs; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[m][n][i] += sum[n][i];
      }
    }
  }

  // Adds the totals of the other warp groups to those of the first, in fixed order.
  __device__ __forceinline__ void add_warp_groups(Reduced& total) const {
    __syncthreads();  // nothing in shared memory is needed any more
    float4* const totals = reinterpret_cast<float4*>(ptx::dynamic_shared());
    constexpr int kSums = 8 * kRankPairs;
    if (warp_group > 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float (&sum)[4] = total[i / (2 * kRankPairs)][i % (2 * kRankPairs)];
        ptx::store_shared(totals + ((warp_group - 1) * kSums + i) * threads + thread,
                          make_float4(sum[0], sum[1], sum[2], sum[3]));
      }
    }
    __syncthreads();
    if (warp_group > 0) return;
    for (int other = 0; other < p.warp_groups - 1; ++other) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float4 part = ptx::load_shared(totals + (other * kSums + i) * threads + thread);
        float (&sum)[4] = total[i / (2 * kRankPairs)][i % (2 * kRankPairs)];
        sum[0] += part.x;
        sum[1] += part.y;
        sum[2] += part.z;
        sum[3] += part.w;
      }
    }
  }

  __device__ __forceinline__ void write_reduced(const Reduced& total) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t range = blockIdx.x / p.tiles, feature = first_feature + reduce_feature() + lane / 4;
    const int rank = reduce_rank() + lane % 4 * 2;
    float* const to = p.reduced + (range * p.features + feature) * p.width + rank;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < 2 * kRankPairs; ++n)
          if (feature + 16 * m + 8 * h < p.features && rank + 8 * n < p.width)
            ptx::store_global(reinterpret_cast<float2*>(to + (16 * m + 8 * h) * p.width + 8 * n),
                              make_float2(total[m][n][2 * h], total[m][n][2 * h + 1]));
  }
};

template <typename Z, int kRanks, bool kProject, bool kReduce>
__global__ void __launch_bounds__(kMaxTokenWarps* kWarp, kRanks == 16 && split_terms(dtype_of<Z>()) == 1 ? 2 : 1)
    token_features_kernel(const TokenFeatures p) {
  using Block = TokenBlock<Z, kRanks>;
  const Block block(p);
  const int steps = block.steps();
  typename Block::Reduced total = {};
  uint4 z[Block::kLoads];
  float4 token_factor[Block::kTokenFactorLoads];

  block.fetch_z(z, 0);
  if constexpr (kReduce) block.fetch_token_factor(token_factor, 0);
  if constexpr (kProject) block.stage_factor();
  block.put_z(z, 0);
  if constexpr (kReduce) block.put_token_factor(token_factor, 0);
  for (int step = 0; step < steps; ++step) {
    if constexpr (Block::kAsync) ptx::cp_async_wait<0>();
    __syncthreads();  // this step's operands have arrived, and those of the last one have been read
    const bool more = step + 1 < steps;
    if (more) block.fetch_z(z, step + 1);
    if constexpr (kReduce)
      if (more) block.fetch_token_factor(token_factor, step + 1);
    if constexpr (kProject) {
      if (step > 0) block.write_projected(step - 1);
      block.project(step);
    }
    if constexpr (kReduce) {
      // project() has hidden the latency of the load: storing before reduce() frees the registers for it.
      if (kProject && more) block.put_token_factor(token_factor, step + 1);
      block.reduce(total, step);
      if (!kProject && more) block.put_token_factor(token_factor, step + 1);
    }
    if (!more) break;
    if constexpr (!Block::kAsync) __syncthreads();  // the only stage of Z has been read
    block.put_z(z, step + 1);
  }
  if constexpr (kProject) {
    __syncthreads();
    block.write_projected(steps - 1);
  }
  if constexpr (kReduce) {
    if (p.warp_groups > 1) block.add_warp_groups(total);
    if (block.warp_group == 0) block.write_reduced(total);
  }
}

}  // namespace lors::cuda
