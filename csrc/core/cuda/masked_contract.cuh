// SPDX-License-Identifier: Apache-2.0
// A given G [N, K], masked and contracted tile by tile with the adapters:
//   partial_B[n, p] = sum_k kept[n, k] G[n, k] lora_A[p, k]        partial_A[k, p] = sum_n kept[n, k] G[n, k] lora_B[n, p]
// G stays fp32: it is split into three bf16 terms in the registers that it is loaded to. Launched by masked_contract.cu; the
// partial sums are added up by reduce.cu.
#pragma once

#include "masked_contract_tile.cuh"

namespace lors::cuda {

// Both contractions of a tile.
template <typename T>
struct ContractBlock : ContractTile<T> {
  using Tile = ContractTile<T>;
  using Tile::column;
  using Tile::column_tile;
  using Tile::kColumnPitch;
  using Tile::kColumns;
  using Tile::kHalves;
  using Tile::kTiles;
  using Tile::kWarpColumns;
  using Tile::lane;
  using Tile::p;
  using Tile::row;
  using Tile::row_tile;
  using Tile::thread;
  using Tile::Tile;
  using Tile::warp_column;
  using Tile::warp_row;
  using typename Tile::Sum;
  static constexpr int kSlabPitch = kWarpColumns + kContractPad, kSlab = 16 * kSlabPitch;  // elements, one term
  static constexpr int kRankPitch = kContractRanks + kContractPad;

  __device__ __forceinline__ uint16_t* lora_A() const { return Tile::template shared<uint16_t>(p.shared.lora_A); }
  __device__ __forceinline__ uint16_t* lora_B() const { return Tile::template shared<uint16_t>(p.shared.lora_B); }

  // Ranks [rank, rank + kContractRanks) of both adapters to shared memory, split into terms.
  __device__ __forceinline__ void stage_adapters(int rank) const {
    if (p.partial_B != nullptr) {
      const int count = split_terms(p.lora_A.dtype);
      for (int task = thread; task < kContractRanks * kColumns / 8; task += kContractThreads) {
        // Four lanes to the 32 columns of each of eight ranks: no bank conflicts.
        const int block = task / kWarp, r = block % 2 * 8 + lane / 4, x = lane % 4;
        const int k = block / 2 * 32 + 8 * x;
        float values[8];
        load_eight(values, p.lora_A, rank + r, column() + k);
        const bool swap = kHalves && (r & 2);  // half of the rows in another order of pairs: no bank conflicts
        if constexpr (kHalves) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = values[i], high = values[i + 4];
            values[i] = swap ? high : low;
            values[i + 4] = swap ? low : high;
          }
        }
        uint16_t* to = lora_A() + r * kColumnPitch + k - 8 * x;
        for (int term = 0; term < count; ++term, to += kContractRanks * kColumnPitch) {
          uint32_t word[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) word[j] = next_term_pair(values[2 * j], values[2 * j + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = swap ? i ^ 2 : i;  // the pair is columns 8 x + 2 j and the next
            const int position = kHalves ? 16 * (x / 2) + 8 * (j % 2) + 4 * (x % 2) + 2 * (j / 2) : 8 * j + 2 * x;
            ptx::store_shared(reinterpret_cast<uint32_t*>(to + position), word[i]);
          }
        }
      }
    }
    if (p.partial_A != nullptr) {
      static_assert(kContractRows * kContractRanks / 8 == kContractThreads);
      const int count = split_terms(p.lora_B.dtype), n = thread / 16 * 8 + thread % 8, r = thread / 8 % 2 * 8;
      float values[8];
      load_eight(values, p.lora_B, row() + n, rank + r);
      uint16_t* to = lora_B() + n * kRankPitch + r;
      for (int term = 0; term < count; ++term, to += kContractRows * kRankPitch)
        ptx::store_shared(reinterpret_cast<uint4*>(to), next_terms(values));
    }
  }

  // part[16 x 16] += a b, for the terms a of G and the terms of an adapter, loaded by load_b(term, b). Small terms first.
  template <typename Load>
  static __device__ __forceinline__ void multiply_terms(float (&part)[2][4], const uint32_t (&a)[3][4], int terms,
                                                        Load load_b) {
#pragma unroll
    for (int j = 2; j >= 0; --j) {
      if (j >= terms) continue;
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
    return kHalves ? first + 16 * (j / 2) + 4 * q + 2 * (j % 2) : first + 8 * q + 2 * j;
  }

  // The offset of ranks [8 i, 8 i + 8) of row `at` of a warp's sums, swizzled against bank conflicts.
  static __device__ __forceinline__ int sum_place(int at, int i) { return at * kContractRanks + (i ^ (at / 2 & 1)) * 8; }
  __device__ __forceinline__ void store_sums(float* to, int at, const float (&part)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::store_shared(reinterpret_cast<float2*>(to + sum_place(at + 8 * h + lane / 4, i) + lane % 4 * 2),
                          make_float2(part[i][2 * h], part[i][2 * h + 1]));
  }

  // Writes the sum of `kParts` warps' partial sums of `kAt` rows to global memory, row `at` to where(at), null: nowhere.
  template <int kParts, int kAt, typename Where>
  __device__ __forceinline__ void write_sums(const float* from, int rank, Where where) const {
#pragma unroll 1  // unrolled, the addresses of all iterations are kept across chunks of ranks and spill
    for (int task = 0; task < kAt * kContractRanks / 4; task += kContractThreads) {
      const int at = (task + thread) / 4, i = (task + thread) % 4;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float4 v = ptx::load_shared(
            reinterpret_cast<const float4*>(from + part * kAt * kContractRanks + sum_place(at, i / 2) + i % 2 * 4));
        total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
      }
      float* const to = where(at);
      if (to != nullptr && rank + 4 * i < p.width) ptx::store_global(reinterpret_cast<float4*>(to + rank + 4 * i), total);
    }
  }

  // Both contractions of the masked tile with ranks [rank, rank + kContractRanks). The caller has staged rank 0's chunk.
  __device__ __forceinline__ void contract(const Sum& sum, int rank) const {
    const int warp = thread / kWarp, terms_A = split_terms(p.lora_A.dtype), terms_B = split_terms(p.lora_B.dtype);
    const bool want_A = p.partial_A != nullptr, want_B = p.partial_B != nullptr;
    uint16_t* const slab = Tile::template shared<uint16_t>(0) + warp * kContractGradientTerms * kSlab;  // this warp's own
    float* const sums_A = Tile::template shared<float>(p.shared.sums_A);
    float* const sums_B = Tile::template shared<float>(p.shared.sums_B);
    const int trans = lane % 8 + lane / 16 * 8, other = lane / 8 % 2 * 8;
    const uint32_t from_slab = ptx::shared_address(slab + trans * kSlabPitch + other);
    const uint32_t from_A = ptx::shared_address(lora_A() + trans * kColumnPitch + warp_column + other);
    const uint32_t from_B = ptx::shared_address(lora_B() + (warp_row + lane % 16) * kRankPitch + lane / 16 * 8);
    uint32_t* const to_slab = reinterpret_cast<uint32_t*>(slab + lane / 4 * kSlabPitch + lane % 4 * 2);

    if (rank > 0) {
      stage_adapters(rank);
      __syncthreads();  // the chunk is staged, and the sums of the one before have been read
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
          multiply_terms(grad_B, g, terms_A, [&](int term, uint32_t (&b)[4]) {
            ptx::ldmatrix_x4(b, from_A + 2 * (term * kContractRanks * kColumnPitch + 16 * c));
          });
        if (want_A) {
#pragma unroll
          for (int term = 0; term < 3; ++term)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              ptx::store_shared(to_slab + (term * kSlab + i % 2 * 8 * kSlabPitch + 16 * c + i / 2 * 8) / 2, g[term][i]);
        }
      }
      if (want_B) store_sums(sums_B + warp_column / kWarpColumns * kContractRows * kContractRanks, warp_row + 16 * m, grad_B);
      if (want_A) {
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kTiles / 2; ++c) {
          uint32_t g[3][4];
#pragma unroll
          for (int term = 0; term < 3; ++term) ptx::ldmatrix_x4_trans(g[term], from_slab + 2 * (term * kSlab + 16 * c));
          multiply_terms(grad_A[c], g, terms_B, [&](int term, uint32_t (&b)[4]) {
            ptx::ldmatrix_x4_trans(b, from_B + 2 * (term * kContractRows + 16 * m) * kRankPitch);
          });
        }
        __syncwarp();  // the slab has been read before the next rows overwrite it
      }
    }
    __syncthreads();  // every slab has been read
    if (want_A) {
#pragma unroll
      for (int c = 0; c < kTiles / 2; ++c)
        store_sums(sums_A + warp_row / 64 * kColumns * kContractRanks, warp_column + 16 * c, grad_A[c]);
    }
    __syncthreads();
    if (want_A)
      write_sums<2, kColumns>(sums_A, rank, [&](int at) -> float* {
        const int64_t k = column() + column_of(at);
        if (k >= p.columns) return nullptr;
        return p.partial_A + (int64_t{row_tile} * p.columns + k) * p.width;
      });
    if (want_B)
      write_sums<4, kContractRows>(sums_B, rank, [&](int at) -> float* {
        const int64_t n = row() + at, rows = p.rows - p.first_row;
        if (n >= p.rows) return nullptr;
        return p.partial_B + (int64_t{column_tile} * rows + n - p.first_row) * p.width;
      });
  }
};

// All ranks, in chunks of kContractRanks. Every chunk recomputes its indices, from shuffles that the compiler cannot hoist:
// otherwise it keeps the addresses of all chunks in registers, and spills.
template <typename Block>
__device__ __forceinline__ void contract_all(const ContractProblem& p, const typename Block::Sum& sum) {
  const int ranks = static_cast<int>(p.width);
#pragma unroll 1
  for (int rank = 0; rank < ranks; rank += kContractRanks) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Block(p, __shfl_sync(0xffffffffu, blockIdx.x, lane), __shfl_sync(0xffffffffu, threadIdx.x, lane)).contract(sum, rank);
  }
}

template <typename T>
__global__ void __launch_bounds__(kContractThreads, 1) masked_contract_kernel(const ContractProblem p) {
  using Block = ContractBlock<T>;
  typename Block::Sum sum;
  const Block block(p, blockIdx.x, threadIdx.x);
  if (p.mask != nullptr)
    block.stage_mask();
  else
    block.stage_nonzero();
  block.stage_adapters(0);
  block.load_given(sum);
  __syncthreads();
  contract_all<Block>(p, sum);
}

}  // namespace lors::cuda
