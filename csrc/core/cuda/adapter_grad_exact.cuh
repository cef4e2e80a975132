// SPDX-License-Identifier: Apache-2.0
// Of G = dY^T X [N, K], or a given G, masked where the weight is zero and never in memory, a tile's part of both gradients:
//   partial_B[n, p] = sum_k G[n, k] lora_A[p, k]        partial_A[k, p] = sum_n G[n, k] lora_B[n, p]
// The masked sums stay fp32: both contractions take them as three bfloat16 planes, from the registers they were summed in.
#pragma once

#include "adapter_grad_exact_product.cuh"

namespace lors::cuda {

// The contractions of a tile, however its G came about.
template <typename Tile>
struct ExactBlock : Tile {
  using Tile::column;
  using Tile::column_tile;
  using Tile::kColumnPitch;
  using Tile::kColumns;
  using Tile::kGiven;
  using Tile::kHalves;
  using Tile::kTiles;
  using Tile::kWarpColumns;
  using Tile::lane;
  using Tile::p;
  using Tile::range;
  using Tile::row;
  using Tile::row_tile;
  using Tile::stages;
  using Tile::thread;
  using Tile::Tile;
  using Tile::warp_column;
  using Tile::warp_row;
  using typename Tile::Sum;
  static constexpr int kSlabPitch = kWarpColumns + kExactPad, kSlab = 16 * kSlabPitch;  // elements, one plane
  static constexpr int kRankPitch = kExactRanks + kExactPad;

  __device__ __forceinline__ uint16_t* lora_A() const { return Tile::template shared<uint16_t>(p.shared.lora_A); }
  __device__ __forceinline__ uint16_t* lora_B() const { return Tile::template shared<uint16_t>(p.shared.lora_B); }

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
    float* const sums_A = Tile::template shared<float>(p.shared.sums_A);
    float* const sums_B = Tile::template shared<float>(p.shared.sums_B);
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
        this->split(g, sum, m, c);
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
  using Block = ExactBlock<ExactProduct<T, kWarpColumns>>;
  typename Block::Sum sum = {};
  const Block block(p, blockIdx.x, threadIdx.x);
  block.product(sum, [&] { block.stage_adapters(0); });
  contract_all<Block>(p, sum);
}

template <typename T>
__global__ void __launch_bounds__(kExactThreads, 1) masked_contract_kernel(const ExactProblem p) {
  using Block = ExactBlock<ExactTile<T, kExactNarrow / 4, true>>;
  typename Block::Sum sum;
  const Block block(p, blockIdx.x, threadIdx.x);
  if (p.mask != nullptr)
    block.stage_mask();
  else
    block.find_weights(0);
  block.stage_adapters(0);
  block.load_given(sum);
  __syncthreads();
  contract_all<Block>(p, sum);
}

}  // namespace lors::cuda
