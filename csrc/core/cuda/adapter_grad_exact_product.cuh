// SPDX-License-Identifier: Apache-2.0
// A block's tile of G = dY^T X (adapter_grad_exact.cuh) as the product of its tokens, in steps that come in while the last
// ones are multiplied: 16-bit dtypes as they are, by cp.async; float32 by registers and as three bfloat16 planes.
#pragma once

#include "adapter_grad_exact_tile.cuh"

namespace lors::cuda {

template <typename T, int kWarpColumns>
struct ExactProduct : ExactTile<T, kWarpColumns, false> {
  using Tile = ExactTile<T, kWarpColumns, false>;
  using Tile::column;
  using Tile::kColumnPitch;
  using Tile::kColumns;
  using Tile::kKeptTasks;
  using Tile::kPlanes;
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
  static constexpr int kStep = exact_step(kPlanes), kStages = exact_stages(kPlanes, kColumns);
  static constexpr int kRowPitch = kExactRows + kExactPad;
  static constexpr int kInputAt = kPlanes * kStep * kRowPitch, kStage = kPlanes * kStep * (kRowPitch + kColumnPitch);

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
    static_assert(kPlanes == 1 || (kStep == 16 && kColumns == 128 && kExactRows == 128));
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
  // meanwhile(): what else has to be staged.
  template <typename Meanwhile>
  __device__ __forceinline__ void product(Sum& sum, Meanwhile meanwhile) const {
    const int steps = static_cast<int>((end_token() - first_token() + kStep - 1) / kStep);
    int task = p.mask == nullptr ? 0 : kKeptTasks;
    Ahead ahead;
    if constexpr (kPlanes == 1) {
#pragma unroll
      for (int step = 0; step < kStages - 1; ++step) copy_stage(step);
    } else {
      fetch_stage(ahead, 0);
    }
    meanwhile();
    if (p.mask != nullptr) this->stage_mask();
    if constexpr (kPlanes == 3) put_stage(ahead, 0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if constexpr (kPlanes == 1) ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the step is there, and the stage that comes next has been read
      if constexpr (kPlanes == 1)
        copy_stage(step + kStages - 1);
      else if (step + 1 < steps)
        fetch_stage(ahead, step + 1);
      typename Tile::template Weights<2> weights;
      const bool more = task < kKeptTasks;
      if (more) this->fetch_weights(weights, task);
      multiply(sum, step);
      if (more) this->put_weights(weights, task);
      task += more ? 2 : 0;
      if constexpr (kPlanes == 3)
        if (step + 1 < steps) put_stage(ahead, step + 1);
    }
    this->find_weights(task);
    if constexpr (kPlanes == 1) ptx::cp_async_wait<0>();
    __syncthreads();
  }
};

}  // namespace lors::cuda
