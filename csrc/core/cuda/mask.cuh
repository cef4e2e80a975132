// SPDX-License-Identifier: Apache-2.0
// A mask between one byte and one bit per weight: bit k % 32 of word [n, k / 32] is mask[n, k]; bits beyond K are 0.
// One thread per half word: its 16 bytes are one access. Launched by mask.cu.
#pragma once

#include "operands.cuh"

namespace lors::cuda {

constexpr int kMaskThreads = 256;

struct MaskProblem {
  uint8_t* mask;         // [N, K] bytes, 0 or 1 (any nonzero byte packs as 1)
  uint16_t* bits;        // [N, halves]: the words' low and high halves
  int64_t out_features;  // N
  int64_t in_features;   // K
  int64_t halves;        // 2 ceil(K / 32)
  bool vectors;          // every row of `mask`, or of `weight`, is aligned to 16 bytes
  const void* weight;    // [N, K] of the kernel's type T; mask_nonzero only
};

// One bit of each nonzero byte of a word, at bit i for byte i.
__device__ __forceinline__ uint32_t nonzero_bytes(uint32_t word) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= uint32_t((word >> (8 * i) & 0xff) != 0) << i;
  return bits;
}
// Four bytes of 0 or 1 from four bits.
__device__ __forceinline__ uint32_t bytes_of(uint32_t bits) {
  return (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21;
}

__global__ void __launch_bounds__(kMaskThreads) mask_pack_kernel(const MaskProblem p) {
  const int64_t index = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x;
  if (index >= p.out_features * p.halves) return;
  const int64_t n = index / p.halves, k = index % p.halves * 16;
  const uint8_t* from = p.mask + n * p.in_features + k;
  uint32_t bits = 0;
  if (p.vectors && k + 16 <= p.in_features) {
    const uint4 v = ptx::load_global_once(reinterpret_cast<const uint4*>(from));
    bits = nonzero_bytes(v.x) | nonzero_bytes(v.y) << 4 | nonzero_bytes(v.z) << 8 | nonzero_bytes(v.w) << 12;
  } else {
    for (int i = 0; i < 16 && k + i < p.in_features; ++i) bits |= uint32_t(ptx::load_global(from + i) != 0) << i;
  }
  ptx::store_global(p.bits + index, static_cast<uint16_t>(bits));
}

__global__ void __launch_bounds__(kMaskThreads) mask_unpack_kernel(const MaskProblem p) {
  const int64_t index = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x;
  if (index >= p.out_features * p.halves) return;
  const int64_t n = index / p.halves, k = index % p.halves * 16;
  uint8_t* to = p.mask + n * p.in_features + k;
  const uint32_t bits = ptx::load_global(p.bits + index);
  if (p.vectors && k + 16 <= p.in_features) {
    ptx::store_global(reinterpret_cast<uint4*>(to),
                      make_uint4(bytes_of(bits), bytes_of(bits >> 4), bytes_of(bits >> 8), bytes_of(bits >> 12)));
  } else {
    for (int i = 0; i < 16 && k + i < p.in_features; ++i) ptx::store_global(to + i, static_cast<uint8_t>(bits >> i & 1));
  }
}

// bits[n, k] = weight[n, k] != 0
template <typename T>
__global__ void __launch_bounds__(kMaskThreads) mask_nonzero_kernel(const MaskProblem p) {
  const int64_t index = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x;
  if (index >= p.out_features * p.halves) return;
  const int64_t n = index / p.halves, k = index % p.halves * 16;
  uint32_t bits = 0;
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    float values[8];
    load_eight<T, true>(static_cast<const T*>(p.weight) + n * p.in_features, k + 8 * eight, p.in_features, p.vectors)
        .get(values);
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= uint32_t(values[i] != 0.f) << (8 * eight + i);
  }
  ptx::store_global(p.bits + index, static_cast<uint16_t>(bits));
}

}  // namespace lors::cuda
