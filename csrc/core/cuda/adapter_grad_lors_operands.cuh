// SPDX-License-Identifier: Apache-2.0
// How adapter_grad_lors.cuh brings its operands into shared memory: 16 bytes at a time, split into planes, and laid out so that
// ldmatrix and the stores before it meet no bank twice.
#pragma once

#include "operands.cuh"

namespace lors::cuda {

template <typename Z>
constexpr int kVectorElements = 16 / static_cast<int>(sizeof(Z));

// 16 bytes of a row of `columns` elements from `column` on, at any address; zeros beyond the row's end.
template <typename Z>
__device__ __forceinline__ uint4 gather_vector(const Z* row, int64_t column, int64_t columns) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kVectorElements<Z>; ++i) {
    if (column + i >= columns) continue;
    if constexpr (sizeof(Z) == 4)
      word[i] = ptx::load_global(reinterpret_cast<const uint32_t*>(row + column + i));
    else
      word[i / 2] |= uint32_t{ptx::load_global(reinterpret_cast<const uint16_t*>(row + column + i))} << (16 * (i % 2));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// The planes of a vector's elements, `plane_size` elements apart.
template <typename Z>
__device__ __forceinline__ void store_planes(uint16_t* to, int plane_size, const uint4& vector) {
  if constexpr (std::is_same_v<Z, bfloat16>) {
    ptx::store_shared(reinterpret_cast<uint4*>(to), vector);
  } else if constexpr (std::is_same_v<Z, float16>) {
    const Eight<float16> eight{{vector}};
    float rest[8];
    eight.get(rest);
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = next_plane_pair(rest[2 * i], rest[2 * i + 1]);
      ptx::store_shared(reinterpret_cast<uint4*>(to + plane * plane_size), make_uint4(word[0], word[1], word[2], word[3]));
    }
  } else {
    float rest[4] = {__uint_as_float(vector.x), __uint_as_float(vector.y), __uint_as_float(vector.z),
                     __uint_as_float(vector.w)};
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      const uint32_t low = next_plane_pair(rest[0], rest[1]);
      ptx::store_shared(reinterpret_cast<uint2*>(to + plane * plane_size), make_uint2(low, next_plane_pair(rest[2], rest[3])));
    }
  }
}

// Where element [row, column] of a tile of rows of kRanks 16-bit elements lies: the 16-byte units of a row change places, so
// that eight rows' same unit lies in eight different groups of banks.
template <int kRanks>
__device__ __forceinline__ int swizzled(int row, int column) {
  return row * kRanks + ((column / 8) ^ (row / (64 / kRanks) % (kRanks / 8))) * 8 + column % 8;
}

// The same for rows of kRanks floats, stored and read in pairs and fours.
template <int kRanks>
__device__ __forceinline__ int swizzled_floats(int row, int column) {
  return row * kRanks + (column ^ (kRanks == 16 ? row / 2 % 2 : row % 4) * 8);
}

}  // namespace lors::cuda
