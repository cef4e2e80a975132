// SPDX-License-Identifier: Apache-2.0
// Codes and slots of layout "2:4" (lors/sparse24.h) in a thread's registers: what mask.cuh and merge_compressed.cuh share.
#pragma once

#include "operands.cuh"

namespace lors::cuda {

// Where a code's slots stand in their group: 0 to 3, or 4 where the slot holds nothing.
__device__ __forceinline__ void slots_of(uint32_t code, uint32_t (&position)[2]) {
  const uint32_t first = code & 3, second = code >> 2 & 3;
  const bool both = first < second, one = first == second;
  position[0] = both || (one && first != 3) ? first : 4;
  position[1] = both || (one && first == 3) ? second : 4;
}
// The four columns a code keeps, as bits; nothing for a code that does not occur.
__device__ __forceinline__ uint32_t kept_by(uint32_t code) {
  uint32_t position[2];
  slots_of(code, position);
  return ((1u << position[0]) | (1u << position[1])) & 15;
}
// The code of a group that keeps these columns: at most two of them.
__device__ __forceinline__ uint32_t code_of(uint32_t kept) {
  return kept == 0 ? 1 : static_cast<uint32_t>((__ffs(static_cast<int>(kept)) - 1) | (31 - __clz(static_cast<int>(kept))) << 2);
}
// values[position], of four in registers; +0 for position 4.
__device__ __forceinline__ float pick(const float (&values)[8], int group, uint32_t position) {
  float v = 0.f;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) v = position == i ? values[4 * group + i] : v;
  return v;
}

// The values [slot, slot + 4) of a row of `slots`; zeros beyond its end. `slot` is a multiple of 4.
template <typename T>
__device__ __forceinline__ void load_four(float (&values)[4], const T* row, int64_t slot, int64_t slots, bool vectors) {
  if (vectors) {
    uint4 v{};
    if (slot < slots) {
      if constexpr (sizeof(T) == 4) {
        v = ptx::load_global_once(reinterpret_cast<const uint4*>(row + slot));
      } else {
        const uint2 half = ptx::load_global(reinterpret_cast<const uint2*>(row + slot));
        v.x = half.x, v.y = half.y;
      }
    }
    float eight[8];
    Eight<T> whole{};
    whole.vector[0] = v;
    whole.get(eight);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = eight[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = slot + i < slots ? to_float(ptx::load_global(row + slot + i)) : 0.f;
}

template <typename T>
__device__ __forceinline__ void store_four(T* row, int64_t slot, int64_t slots, bool vectors, const float (&values)[4]) {
  if (vectors) {
    if (slot >= slots) return;
    const float eight[8] = {values[0], values[1], values[2], values[3]};
    Eight<T> whole;
    whole.set(eight);
    const uint4 v = whole.vector[0];
    if constexpr (sizeof(T) == 4)
      ptx::store_global(reinterpret_cast<uint4*>(row + slot), v);
    else
      ptx::store_global(reinterpret_cast<uint2*>(row + slot), make_uint2(v.x, v.y));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (slot + i < slots) ptx::store_global(row + slot + i, from_float<T>(values[i]));
}

}  // namespace lors::cuda
