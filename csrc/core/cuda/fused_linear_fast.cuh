// SPDX-License-Identifier: Apache-2.0
// partial[split, t, n] = sum over a block's columns of activation[t, k] W~[n, k], or, for the input gradient,
// partial[split, t, k] = sum over a block's rows of activation[t, n] W~[n, k]; W~ = round(kept ? weight + s lora_B lora_A :
// +0), of experts that of row t; rows without an expert are left to reduce.cu. fused_linear for few tokens and what most calls
// have (fused_linear_fast_config.h), from every layout. W~ is merged as in merge_fast.cuh, and what a lane merges is what it
// holds of the next mma's first operand: the forward pass multiplies rows of W~; the input gradient columns, for which lora_B
// lora_A is computed transposed. Launched by fused_linear_fast.cu; the parts are added up by reduce.cu.
#pragma once

#include "fused_linear_fast_config.h"
#include "fused_linear_tiles.cuh"
#include "merge_adapters.cuh"
#include "merge_fast_source.cuh"

namespace lors::cuda {

// sum[i][o][2 h + e] of lora_B lora_A: column 8 (lane / 4) + 4 half + 2 i + h of the group of 64, row 8 o + 2 (lane % 4) + e of
// the warp's. lora_A: as stage_fragments leaves it; lora_B: the lane's address for ldmatrix.
__device__ __forceinline__ void multiply_transposed(float (&sum)[2][2][4], const uint4* lora_A, uint32_t lora_B, int terms_A,
                                                    int terms_B, int chunk, int groups, int panel_rows, int half) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0.f;
  int order = terms_A + terms_B - 2;  // as in multiply_adapters
  for (order = order < kMaxTerms ? order : kMaxTerms - 1; order >= 0; --order) {
    for (int i = 0; i <= order; ++i) {
      const int j = order - i;
      if (i >= terms_A || j >= terms_B) continue;
#pragma unroll 1
      for (int slice = 0; slice < chunk / 16; ++slice) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, lora_B + 2 * (j * panel_rows * (chunk + kMergePad) + 16 * slice));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint4 v = ptx::load_shared(lora_A + ((i * (chunk / 16) + slice) * groups * 4 + 2 * half + tile) * kWarp);
          const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int o = 0; o < 2; ++o) ptx::mma_m16n8k16<bfloat16>(sum[tile][o], a, b[o], b[2 + o]);
        }
      }
    }
  }
}

// The warps that lie side by side have each 16 rows x 16 tokens of the same sums, acc[o][2 h + e]: row lane / 4 + 8 h, token
// 8 o + 2 (lane % 4) + e. A step's go through shared memory, two steps in turn.
struct FusedSums {
  float* to;          // of this lane
  const float* from;  // of this thread's row and token, in the first of the eight warps that it adds up
  float* out;         // the same in the parts
  bool wide;          // eight warps side by side; else twice four
  int row;            // of a step, or beyond all where there is no such token; and, where not wide, 16 rows below

  __device__ __forceinline__ FusedSums(const FusedProblem& f, const ExpertTile& tile, float* sums, int across, int64_t split,
                                       int64_t first_row) {
    // Slots are swapped so that neither the eight lanes of a store nor the rows of two tokens meet in a bank.
    const auto slot = [](int g, int q) { return (8 * q + (g ^ 2 * q)) * 4; };
    const int lane = threadIdx.x % kWarp, t = threadIdx.x % 256 / 16, n = threadIdx.x % 16, eight = threadIdx.x / 256;
    to = sums + threadIdx.x / kWarp * 256 + slot(lane / 4, lane % 4);
    from = sums + eight * 2048 + t / 8 * 128 + slot(n % 8, t % 8 / 2) + n / 8 * 2 + t % 2;
    wide = across == 8;
    const int below = (wide ? 16 : 32) * eight + n;
    row = t < tile.rows ? below : 1 << 30;
    out = f.partial + (split * f.tokens + tile.first + t) * f.partial_pitch + first_row + below;
  }
  // By the whole block; `rows`: from the step's first on. Moves on by `step` rows.
  __device__ __forceinline__ void add(const float (&acc)[2][4], int rows, int step, int buffer) {
    constexpr int kBuffer = kFusedFastSumsBytes / 8;
#pragma unroll
    for (int o = 0; o < 2; ++o)
      ptx::store_shared(reinterpret_cast<float4*>(to + buffer * kBuffer + 128 * o),
                        make_float4(acc[o][0], acc[o][1], acc[o][2], acc[o][3]));
    __syncthreads();
    float four[2] = {};
#pragma unroll
    for (int warp = 0; warp < 8; ++warp) four[warp / 4] += ptx::load_shared(from + buffer * kBuffer + 256 * warp);
    if (row < rows) ptx::store_global(out, wide ? four[0] + four[1] : four[0]);
    if (!wide && row + 16 < rows) ptx::store_global(out + 16, four[1]);
    out += step;
  }
};

// Of a block: its tokens, and its part of their expert's weight.
struct FastPlace {
  ExpertTile tile;
  unsigned row_block;
  int64_t first_row, first_column;
};

// SourceOf: merge_fast_source.cuh. T: of the weight and the activation. kOne: forward with one split term of each adapter and
// 16 ranks.
template <template <typename, typename> typename SourceOf, typename T, bool kGradient, bool kOne>
__global__ void __launch_bounds__(kFusedFastThreads, 1)
    fused_linear_fast_kernel(const MergeProblem p, const FusedProblem f, const int columns, const int extra_at,
                             const int tile_at, const unsigned blocks) {
  static_assert(!kGradient || !kOne);  // of so few tokens it is seldom wanted
  using Lanes = FastLanes<kGradient, kFusedFastThreads>;
  const ExpertTile tile = expert_tile(f.experts, f.tokens, kFusedFastTokens, blockIdx.x / blocks);
  if (tile.rows == 0 || tile.expert == f.experts.count) return;
  const int lane = threadIdx.x % kWarp;
  const int terms_A = kOne ? 1 : split_terms(p.lora_A.dtype), terms_B = kOne ? 1 : split_terms(p.lora_B.dtype);
  const int chunk = kOne ? 16 : p.chunk;
  uint8_t* const shared = ptx::dynamic_shared();
  uint16_t* const lora_A = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const lora_B = lora_A + terms_A * chunk * (columns + kMergePad);
  // Where the block is, once more in shared memory: the registers do not suffice.
  int4* const stored = reinterpret_cast<int4*>(shared + tile_at);
  if (threadIdx.x == 0)
    ptx::store_shared(stored, make_int4(tile.expert, tile.first, tile.rows, static_cast<int>(blockIdx.x % blocks)));
  const auto load_place = [&] {
    const int4 v = ptx::load_shared(stored);
    const unsigned row_block = static_cast<unsigned>(v.w) / static_cast<unsigned>(p.column_blocks);
    const unsigned column_block = static_cast<unsigned>(v.w) - row_block * static_cast<unsigned>(p.column_blocks);
    return FastPlace{{v.x, v.y, v.z}, row_block, int64_t{row_block} * p.rows, int64_t{column_block} * columns};
  };
  const auto activation = [&](const ExpertTile& tile, int token, int64_t column) {
    const int64_t row = token < tile.rows ? gathered(f.experts.gather, tile.first + token) : 0;
    return load_eight<T>(static_cast<const T*>(f.activation) + row * f.depth, column, token < tile.rows ? f.depth : 0,
                         f.activation_vectors)
        .vector[0];
  };

  FastBlock<Lanes> block(p, columns, blockIdx.x % blocks);
  const int64_t first_row = int64_t{block.row_block} * p.rows, first_column = int64_t{block.column_block} * columns;
  const MergeProblem own = of_expert(p, tile.expert, sizeof(T));
  if constexpr (kGradient)
    stage_fragments(reinterpret_cast<uint4*>(shared), own.lora_A, 0, first_column, chunk, columns);
  else
    stage_lora_A<false>(lora_A, own.lora_A, 0, first_column, chunk, columns);
  SourceOf<T, Lanes> source(own, columns, block.row, block.column, block.step);
#pragma unroll
  for (int i = 0; i < 4; ++i) source.load(block.below[i % 2], Lanes::below(i / 2, i % 2), i / 2, i % 2);
  const uint4* fragments = reinterpret_cast<const uint4*>(shared) + block.warp_column / 64 * 4 * kWarp + lane;

  // Forward: the activation of the lane's columns, [tokens of eight][c], in slots of its own: the registers do not suffice.
  uint4* const x = reinterpret_cast<uint4*>(shared + extra_at + kFusedFastSumsBytes) + threadIdx.x;
  if constexpr (!kGradient) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = i / 2 * 8 + lane / 4;
      ptx::store_shared(x + i * kFusedFastThreads, activation(tile, token, block.column + i % 2 * 32));
    }
  }
  T* const panel_activation = reinterpret_cast<T*>(shared + extra_at);  // input gradient: [tokens][panel_rows + pad]
  const int activation_pitch = p.panel_rows + kFusedFastPad;

  const int across = columns / 64;
  FusedSums sums(f, tile, reinterpret_cast<float*>(shared + extra_at), across, block.column_block, first_row);
  float out[4][2][4] = {};  // input gradient: [i][tokens of eight][2 h + e], column 8 (lane / 4) + 2 i + h
  for (int panel = 0; panel < block.rows; panel += p.panel_rows) {
    __syncthreads();  // the last panel has been read, and the tile is there
    const FastPlace place = load_place();
    const MergeProblem own = of_expert(p, place.tile.expert, sizeof(T));
    stage_lora_B(lora_B, own.lora_B, place.first_row + panel, 0, p.panel_rows, chunk);
    source.stage(own, place.first_row + panel, place.first_column, block.rows - panel);
    if constexpr (kGradient) {
      const int eights = p.panel_rows / 8;
      for (int task = threadIdx.x; task < kFusedFastTokens * eights; task += kFusedFastThreads) {
        const int token = task / eights, n = task % eights * 8;
        ptx::store_shared(reinterpret_cast<uint4*>(panel_activation + token * activation_pitch + n),
                          activation(place.tile, token, place.first_row + panel + n));
      }
    }
    __syncthreads();
    const int end = block.rows - panel < p.panel_rows ? block.rows - panel : p.panel_rows;
    uint32_t from_B = ptx::shared_address(lora_B + (block.warp_row + lane % 16) * (chunk + kMergePad) + lane / 16 * 8);
    const uint32_t from_A = ptx::shared_address(lora_A + lane % 16 * (columns + kMergePad) + block.warp_column + lane / 16 * 8);
    uint32_t from_activation = ptx::shared_address(panel_activation + (lane / 16 * 8 + lane % 8) * activation_pitch +
                                                   block.warp_row + lane / 8 % 2 * 8);
    source.start(block.warp_row + Lanes::row(), block.warp_column, end);
    for (int at = 0; at < end; at += block.step) {  // the same steps for all warps
      source.step(p, at, end);
      if constexpr (kGradient) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum[2][2][4];
          multiply_transposed(sum, fragments, from_B, terms_A, terms_B, chunk, across, p.panel_rows, half);
          uint2 merged[2][2];
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float four[4] = {sum[0][o][e], sum[0][o][2 + e], sum[1][o][e], sum[1][o][2 + e]};
              merged[o][e] = source.merged(o, e, half, four, p.scaling);
            }
          uint32_t y[4];
          ptx::ldmatrix_x4(y, from_activation);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint2 &low = merged[j / 2][0], &high = merged[j / 2][1];
              w[j] = ptx::pick_bytes(i ? low.y : low.x, i ? high.y : high.x, j % 2 ? 0x7632 : 0x5410);
            }
#pragma unroll
            for (int o = 0; o < 2; ++o) ptx::mma_m16n8k16<T>(out[2 * half + i][o], w, y[2 * o], y[2 * o + 1]);
          }
        }
        from_activation += 2 * block.step;
        // What is multiplied by the zeros beyond the last row must not be NaN.
        if (block.rows - panel - at < 2 * block.step) source.clear();
#pragma unroll
        for (int i = 0; i < 4; ++i) source.load(block.below[0], block.step + Lanes::below(i / 2, i % 2), i / 2, i % 2);
      } else {
        float sum[2][4][4], acc[2][4] = {};
        uint32_t b[4];
        if constexpr (kOne) {
          ptx::ldmatrix_x4(b, from_B);
        } else {
#pragma unroll
          for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.f;
          multiply_adapters(sum, lora_A, lora_B, terms_A, terms_B, chunk, columns, p.panel_rows, at + block.warp_row,
                            block.warp_column);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (c == 1) __syncwarp();  // for the compiler: to have all in registers at once, they do not suffice
          if constexpr (kOne) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              uint32_t a[4];
              ptx::ldmatrix_x4_trans(a, from_A + 64 * c + 16 * i);
              ptx::mma_m16n8k16_zero<bfloat16>(sum[c][i], b, a[0], a[1]);
              ptx::mma_m16n8k16_zero<bfloat16>(sum[c][i + 1], b, a[2], a[3]);
            }
          }
          uint2 merged[2][2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float four[4] = {sum[c][2 * half][2 * h], sum[c][2 * half][2 * h + 1], sum[c][2 * half + 1][2 * h],
                                     sum[c][2 * half + 1][2 * h + 1]};
              merged[h][half] = source.merged(h, c, half, four, p.scaling);
            }
            source.load(block.below[c], block.step + Lanes::below(h, c), h, c);
          }
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            const uint4 v = ptx::load_shared(x + (2 * o + c) * kFusedFastThreads);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t w[4] = {merged[0][half].x, merged[1][half].x, merged[0][half].y, merged[1][half].y};
              ptx::mma_m16n8k16<T>(acc[o], w, half ? v.z : v.x, half ? v.w : v.y);
            }
          }
        }
        sums.add(acc, end - at, block.step, at / block.step % 2);
      }
      from_B += 2 * block.step * (chunk + kMergePad);
      block.below[0] -= block.step;
      if constexpr (!kGradient) block.below[1] -= block.step;
    }
  }

  if constexpr (kGradient) {
    __syncthreads();
    const FastPlace place = load_place();
    // Adds up the warps below each other, and writes whole sectors: [warps below][tokens][columns + pad].
    float* const parts = reinterpret_cast<float*>(shared);
    const int pitch = columns + kFusedFastSumsPad, size = kFusedFastTokens * pitch;
#pragma unroll
    for (int o = 0; o < 2; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 four[2] = {make_float4(out[0][o][e], out[0][o][2 + e], out[1][o][e], out[1][o][2 + e]),
                                make_float4(out[2][o][e], out[2][o][2 + e], out[3][o][e], out[3][o][2 + e])};
        float4* const to = reinterpret_cast<float4*>(parts + block.warp_row / 16 * size + (8 * o + 2 * (lane % 4) + e) * pitch +
                                                     block.warp_column + lane / 4 * 8);
        const bool swap = lane % 2;  // against bank conflicts
        ptx::store_shared(to + swap, swap ? four[1] : four[0]);
        ptx::store_shared(to + !swap, swap ? four[0] : four[1]);
      }
    __syncthreads();
    const int fours = columns / 4;
    float* const to = f.partial + (place.row_block * f.tokens + place.tile.first) * f.partial_pitch + place.first_column;
    for (int task = threadIdx.x; task < place.tile.rows * fours; task += kFusedFastThreads) {
      const int t = task / fours, k = task % fours * 4;
      if (place.first_column + k >= f.columns) continue;
      float4 sum = ptx::load_shared(reinterpret_cast<const float4*>(parts + t * pitch + k));
      for (int i = 1; i < kFusedFastWarps / across; ++i) {
        const float4 more = ptx::load_shared(reinterpret_cast<const float4*>(parts + i * size + t * pitch + k));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      ptx::store_global(reinterpret_cast<float4*>(to + t * f.partial_pitch + k), sum);
    }
  }
}

}  // namespace lors::cuda
