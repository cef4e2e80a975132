// SPDX-License-Identifier: Apache-2.0
// One pass over Z [tokens, features], which is dY or X:
//   projected[t, p] = sum_f Z[t, f] factor[f, p]        reduced[f, p] = sum_t Z[t, f] product[t, p]
// Each element of Z is read once for both sums; what blocks share is left as partial sums for reduce.cuh.
#pragma once

#include "adapter_grad_lors_config.h"
#include "adapter_grad_lors_operands.cuh"

namespace lors::cuda {

struct TokenFeatures {
  const void* z = nullptr;  // [tokens, features] row-major, of the kernel's type Z
  bool z_vectors = false;   // its rows can be read 16 bytes at a time
  int64_t tokens = 0;
  int64_t features = 0;
  Matrix factor;                   // lora_B [features, r], or lora_A [r, features] where `factor_by_rank`
  bool factor_by_rank = false;     // which of the two layouts
  int64_t rank = 0;                // the first rank of this pass
  int64_t width = 0;               // ranks of this pass rounded up to a multiple of 4: the pitch of the three below
  const float* product = nullptr;  // [tokens, width]
  float* projected = nullptr;      // [tiles, tokens, width], partial sums
  float* reduced = nullptr;        // [ranges, features, width], partial sums
  int64_t tiles = 0;               // of features, one per block
  int64_t range_tokens = 0;        // per block
  int teams = 0, team_warps = 0;   // of a block
  int tile_features = 0;           // of a team: TokenTile::features and feature_groups
  int feature_groups = 0;          // (see there)
  TokenShared shared;
};

// One block's work. Its teams of warps have the same features and take turns at the steps. kRanks, and from it and Z everything
// in `kTile`, say what a warp does; the number of warps says how many features a team has.
template <typename Z, int kRanks>
struct TokenBlock {
  static constexpr int kPlanes = planes_of(dtype_of<Z>());
  static constexpr TokenTile kTile = token_tile(kRanks, kPlanes);
  static constexpr int kTokens = kTile.tokens;
  static constexpr bool kAsync = kPlanes == 1;  // memory holds the plane itself: it is copied in the background
  static constexpr int kRankPairs = kTile.reduce_ranks / 16;
  static constexpr int kProjectTokens = kTokens / 16 / kTile.token_groups;
  static constexpr int kRowsPerLoad = kMaxTokenWarps * kTile.rank_groups / static_cast<int>(sizeof(Z));
  static constexpr int kLoads = kTokens / kRowsPerLoad;  // 16-byte vectors of Z per thread and step
  static constexpr int kProductLoads = (kTokens * kRanks / 4 + kTile.min_warps * kWarp - 1) / (kTile.min_warps * kWarp);

  const TokenFeatures& p;
  int team, threads, thread;    // the team, its threads, and which of them this is
  int features, pitch, z_size;  // of the tile; elements of a row of it; elements of a stage
  uint16_t *z, *product, *factor;
  float* projected;
  int64_t tile, first_feature, first_token, end_token;

  __device__ __forceinline__ explicit TokenBlock(const TokenFeatures& problem) : p(problem) {
    threads = p.team_warps * kWarp;
    team = threadIdx.x / threads;
    thread = threadIdx.x % threads;
    features = p.tile_features;
    pitch = features + kTokenFeaturePad;
    z_size = kPlanes * kTokens * pitch;
    uint8_t* const base = ptx::dynamic_shared() + team * p.shared.team;
    z = reinterpret_cast<uint16_t*>(base);
    product = reinterpret_cast<uint16_t*>(base + p.shared.z);
    projected = reinterpret_cast<float*>(base + p.shared.z + p.shared.product);
    factor = reinterpret_cast<uint16_t*>(ptx::dynamic_shared() + p.teams * p.shared.team);
    tile = blockIdx.x % p.tiles;
    first_feature = tile * features;
    first_token = blockIdx.x / p.tiles * p.range_tokens;
    end_token = first_token + p.range_tokens < p.tokens ? first_token + p.range_tokens : p.tokens;
  }

  __device__ __forceinline__ int steps() const {
    return static_cast<int>((end_token - first_token + kTokens * p.teams - 1) / (kTokens * p.teams));
  }
  __device__ __forceinline__ int64_t step_token(int step) const {
    return first_token + (int64_t{step} * p.teams + team) * kTokens;
  }
  __device__ __forceinline__ uint16_t* z_stage(int step) const { return z + step % kTile.stages * z_size; }
  __device__ __forceinline__ uint16_t* product_stage(int step) const {
    return product + step % 2 * (kProductPlanes * kTokens * kRanks);
  }
  __device__ __forceinline__ float* projected_stage(int step) const {
    return projected + step % 2 * (p.feature_groups * kTokens * kRanks);
  }

  // The thread's 16-byte vectors of a step of Z lie kRowsPerLoad tokens apart; this is the first.
  __device__ __forceinline__ int z_row() const { return thread / (features / kVectorElements<Z>); }
  __device__ __forceinline__ int z_column() const { return thread % (features / kVectorElements<Z>)*kVectorElements<Z>; }
  __device__ __forceinline__ uint16_t* z_place(int step) const { return z_stage(step) + z_row() * pitch + z_column(); }

  // Sends for the step's rows of Z: into shared memory in the background, or into `held`. Tokens beyond the end are zeros.
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

  // Takes the step's rows into shared memory where fetch_z has not.
  __device__ __forceinline__ void put_z(const uint4 (&held)[kLoads], int step) const {
    if constexpr (kAsync) return;
    if (!p.z_vectors) return copy_unaligned(step);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store_planes<Z>(z_place(step) + i * kRowsPerLoad * pitch, kTokens * pitch, held[i]);
  }

  __device__ __forceinline__ void copy_unaligned(int step) const {
    const int64_t token = step_token(step) + z_row();
    const Z* const from = static_cast<const Z*>(p.z) + token * p.features;
#pragma unroll 1
    for (int row = 0; row < kTokens; row += kRowsPerLoad)
      store_planes<Z>(
          z_place(step) + row * pitch, kTokens * pitch,
          gather_vector(from + row * p.features, first_feature + z_column(), token + row < end_token ? p.features : 0));
  }

  // Which four ranks of which token the thread's i-th vector of the product is; eight lanes take eight tokens, so that the
  // stores of their planes meet no bank twice.
  __device__ __forceinline__ bool product_place(int i, int& row, int& column) const {
    const int task = i * threads + thread;
    row = task / (2 * kRanks) * 8 + task % 8;
    column = task / 8 % (kRanks / 4) * 4;
    return task < kTokens * kRanks / 4;
  }

  __device__ __forceinline__ void fetch_product(float4 (&held)[kProductLoads], int step) const {
#pragma unroll
    for (int i = 0; i < kProductLoads; ++i) {
      int row, column;
      const bool mine = product_place(i, row, column);
      const int64_t token = step_token(step) + row;
      held[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (mine && token < end_token && column < p.width)
        held[i] = ptx::load_global(reinterpret_cast<const float4*>(p.product + token * p.width + column));
    }
  }

  __device__ __forceinline__ void put_product(const float4 (&held)[kProductLoads], int step) const {
#pragma unroll
    for (int i = 0; i < kProductLoads; ++i) {
      int row, column;
      if (!product_place(i, row, column)) continue;
      const uint4 bits = make_uint4(__float_as_uint(held[i].x), __float_as_uint(held[i].y), __float_as_uint(held[i].z),
                                    __float_as_uint(held[i].w));
      store_planes<float>(product_stage(step) + swizzled<kRanks>(row, column), kTokens * kRanks, bits);
    }
  }

  // The factor's rows of this tile: [features][ranks] swizzled, or [ranks][pitch], as they lie in memory.
  __device__ __forceinline__ void stage_factor() const {
    const int planes = planes_of(p.factor.dtype);
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
      for (int plane = 0; plane < planes; ++plane) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = next_plane_pair(values[2 * i], values[2 * i + 1]);
        ptx::store_shared(reinterpret_cast<uint4*>(factor + plane * kRanks * pitch + at),
                          make_uint4(word[0], word[1], word[2], word[3]));
      }
    }
  }

  // Z factor over this warp's features, for its tokens and 16 ranks, left in shared memory beside those of the other warps.
  __device__ __forceinline__ void project(int step) const {
    const int lane = threadIdx.x % kWarp, warp = thread / kWarp;
    const int token = warp % kTile.token_groups * (16 * kProjectTokens);
    const int rank = warp / kTile.token_groups % (kRanks / 16) * 16;
    const int group = warp / (kTile.token_groups * (kRanks / 16));
    const int planes = planes_of(p.factor.dtype), by_rank = p.factor_by_rank;
    const int feature = group * kTile.feature_span;
    const uint32_t from_z = ptx::shared_address(z_stage(step) + (token + lane % 16) * pitch + feature + lane / 16 * 8);
    const int at = by_rank ? (rank + lane % 8 + lane / 16 * 8) * pitch + feature + lane / 8 % 2 * 8
                           : swizzled<kRanks>(feature + lane % 16, rank + lane / 16 * 8);
    const uint32_t from_factor = ptx::shared_address(factor + at);
    const int factor_step = 2 * (by_rank ? 1 : kRanks);  // bytes from feature to feature

    float sum[kProjectTokens][2][4] = {};
#pragma unroll 1
    for (int k = 0; k < kTile.feature_span; k += 16) {
      uint32_t a[kProjectTokens][kPlanes][4];
#pragma unroll
      for (int m = 0; m < kProjectTokens; ++m)
#pragma unroll
        for (int i = 0; i < kPlanes; ++i) ptx::ldmatrix_x4(a[m][i], from_z + 2 * ((i * kTokens + 16 * m) * pitch + k));
#pragma unroll 1
      for (int j = planes - 1; j >= 0; --j) {  // the small planes first
        uint32_t b[4];
        const uint32_t from = from_factor + 2 * j * kRanks * pitch + k * factor_step;
        if (by_rank)
          ptx::ldmatrix_x4(b, from);
        else
          ptx::ldmatrix_x4_trans(b, from);
#pragma unroll
        for (int i = kPlanes - 1; i >= 0; --i) {
          if (i + j >= kMaxPlanes) continue;
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

  // What the warps left of a step, added up in their order.
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

  // Adds the step's Z^T product. Sixteen tokens' products are summed apart, small planes first, and added to the total once:
  // the total is then rounded once for all of them, and to nearest.
  __device__ __forceinline__ void reduce(Reduced& total, int step) const {
    const int lane = threadIdx.x % kWarp, rank = reduce_rank();
    const uint32_t from_z =
        ptx::shared_address(z_stage(step) + (lane % 8 + lane / 16 * 8) * pitch + reduce_feature() + lane / 8 % 2 * 8);
    const uint32_t from_product = ptx::shared_address(product_stage(step) + swizzled<kRanks>(lane % 16, rank + lane / 16 * 8));
#pragma unroll 1  // registers are full of totals
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t b[kRankPairs][kProductPlanes][4];
#pragma unroll
      for (int q = 0; q < kRankPairs; ++q)
#pragma unroll
        for (int j = 0; j < kProductPlanes; ++j)
          // The unit of 16 ranks further is 2 units away, and where units change places the bit of 2 flips.
          ptx::ldmatrix_x4_trans(b[q][j], (from_product ^ (32 * q)) + 2 * (j * kTokens + t) * kRanks);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float sum[2 * kRankPairs][4] = {};
        uint32_t a[kPlanes][4];
#pragma unroll
        for (int i = 0; i < kPlanes; ++i) ptx::ldmatrix_x4_trans(a[i], from_z + 2 * ((i * kTokens + t) * pitch + 16 * m));
#pragma unroll
        for (int order = kMaxPlanes - 1; order >= 0; --order)
#pragma unroll
          for (int i = 0; i < kPlanes; ++i) {
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

  // Adds the other teams' totals to the first team's, in their order.
  __device__ __forceinline__ void add_teams(Reduced& total) const {
    __syncthreads();  // shared memory is free
    float4* const totals = reinterpret_cast<float4*>(ptx::dynamic_shared());
    constexpr int kSums = 8 * kRankPairs;
    if (team > 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float (&sum)[4] = total[i / (2 * kRankPairs)][i % (2 * kRankPairs)];
        ptx::store_shared(totals + ((team - 1) * kSums + i) * threads + thread, make_float4(sum[0], sum[1], sum[2], sum[3]));
      }
    }
    __syncthreads();
    if (team > 0) return;
    for (int other = 0; other < p.teams - 1; ++other) {
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
__global__ void __launch_bounds__(kMaxTokenWarps* kWarp, kRanks == 16 && planes_of(dtype_of<Z>()) == 1 ? 2 : 1)
    token_features_kernel(const TokenFeatures p) {
  using Block = TokenBlock<Z, kRanks>;
  const Block block(p);
  const int steps = block.steps();
  typename Block::Reduced total = {};
  uint4 z[Block::kLoads];
  float4 product[Block::kProductLoads];

  block.fetch_z(z, 0);
  if constexpr (kReduce) block.fetch_product(product, 0);
  if constexpr (kProject) block.stage_factor();
  block.put_z(z, 0);
  if constexpr (kReduce) block.put_product(product, 0);
  for (int step = 0; step < steps; ++step) {
    if constexpr (Block::kAsync) ptx::cp_async_wait<0>();
    __syncthreads();  // the step's operands are there, and whatever the last one used is free
    const bool more = step + 1 < steps;
    if (more) block.fetch_z(z, step + 1);
    if constexpr (kReduce)
      if (more) block.fetch_product(product, step + 1);
    if constexpr (kProject) {
      if (step > 0) block.write_projected(step - 1);
      block.project(step);
    }
    if constexpr (kReduce) {
      // Where there was something to do meanwhile, the product has arrived, and frees its registers.
      if (kProject && more) block.put_product(product, step + 1);
      block.reduce(total, step);
      if (!kProject && more) block.put_product(product, step + 1);
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
    if (p.teams > 1) block.add_teams(total);
    if (block.team == 0) block.write_reduced(total);
  }
}

}  // namespace lors::cuda
