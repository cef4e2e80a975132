// SPDX-License-Identifier: Apache-2.0
// Weights [N, K] of layout "2:4" (lors/sparse24.h): values [N, K/2] and a code of four bits per group of four columns.
// One thread per byte of metadata, eight columns; one per 32 columns where a mask is written. Launched by sparse24.cu.
#pragma once

#include "sparse24_slots.cuh"
#include "tally.cuh"

namespace lors::cuda {

constexpr int kSparse24Threads = 256;

struct Sparse24Problem {
  const void* weight;   // [N, K] of the kernel's type T
  const uint8_t* mask;  // [N, mask_pitch] bytes of bits, 1 = kept; null: kept where weight != 0
  int64_t mask_pitch;   // 4 ceil(K / 32)
  void* values;         // [N, K/2] of type T
  uint8_t* metadata;    // [N, bytes]
  uint32_t* bits;       // [N, ceil(K / 32)]
  Tally* tallies;       // [warps of the grid]
  int64_t out_features, in_features;
  int64_t bytes;  // ceil(K / 8)
  bool weight_vectors, values_vectors;
};

// Which of the columns [8 byte, 8 byte + 8) of row n are kept; none beyond K.
__device__ __forceinline__ uint32_t kept_eight(const Sparse24Problem& p, int64_t n, int64_t byte, const float (&values)[8]) {
  if (p.mask != nullptr) return ptx::load_global(p.mask + n * p.mask_pitch + byte);
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) kept |= uint32_t(values[i] != 0.f) << i;
  return kept;
}

template <typename T>
__device__ __forceinline__ void weight_eight(float (&values)[8], const Sparse24Problem& p, int64_t n, int64_t byte) {
  load_eight<T, true>(static_cast<const T*>(p.weight) + n * p.in_features, 8 * byte, p.in_features, p.weight_vectors)
      .get(values);
}

// Groups that keep more than two, along K and, four rows at a time, along N. One thread: four rows of eight columns.
template <typename T>
__global__ void __launch_bounds__(kSparse24Threads) sparse24_inspect_kernel(const Sparse24Problem p) {
  const int64_t index = int64_t{blockIdx.x} * kSparse24Threads + threadIdx.x;
  const int64_t row = index / p.bytes * 4, byte = index % p.bytes;
  Tally tally;
  uint32_t kept[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i >= p.out_features) continue;
    float values[8] = {};
    if (p.mask == nullptr) weight_eight<T>(values, p, row + i, byte);
    kept[i] = kept_eight(p, row + i, byte, values);
    for (int group = 0; group < 2; ++group)
      if (__popc(kept[i] >> (4 * group) & 15) > 2) tally.add((row + i) * (p.in_features / 4) + 2 * byte + group);
  }
  const uint32_t pair = kept[0] & kept[1], other = kept[2] & kept[3];
  tally.columns = __popc((pair & (kept[2] | kept[3])) | (other & (kept[0] | kept[1])));
  tally.store(p.tallies, index / kWarp);
}

template <typename T>
__global__ void __launch_bounds__(kSparse24Threads) sparse24_compress_kernel(const Sparse24Problem p) {
  const int64_t index = int64_t{blockIdx.x} * kSparse24Threads + threadIdx.x, n = index / p.bytes, byte = index % p.bytes;
  if (n >= p.out_features) return;
  float values[8], slots[4];
  weight_eight<T>(values, p, n, byte);
  const uint32_t kept = kept_eight(p, n, byte, values);
  uint32_t codes = 0;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const uint32_t code = code_of(kept >> (4 * group) & 15);
    if (8 * byte + 4 * group < p.in_features) codes |= code << (4 * group);
    uint32_t position[2];
    slots_of(code, position);
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) slots[2 * group + slot] = pick(values, group, position[slot]) + 0.f;  // -0 to +0
  }
  store_four(static_cast<T*>(p.values) + n * (p.in_features / 2), 4 * byte, p.in_features / 2, p.values_vectors, slots);
  if (p.metadata != nullptr) ptx::store_global(p.metadata + index, static_cast<uint8_t>(codes));
}

template <typename T>
__global__ void __launch_bounds__(kSparse24Threads) sparse24_decompress_kernel(const Sparse24Problem p) {
  const int64_t index = int64_t{blockIdx.x} * kSparse24Threads + threadIdx.x, n = index / p.bytes, byte = index % p.bytes;
  if (n >= p.out_features) return;
  float slots[4], values[8];
  load_four(slots, static_cast<const T*>(p.values) + n * (p.in_features / 2), 4 * byte, p.in_features / 2, p.values_vectors);
  const uint32_t codes = ptx::load_global(p.metadata + index);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    uint32_t position[2];
    slots_of(codes >> (4 * group), position);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      values[4 * group + i] = position[0] == i ? slots[2 * group] : position[1] == i ? slots[2 * group + 1] : 0.f;
  }
  Eight<T> out;
  out.set(values);
  store_eight(static_cast<T*>(const_cast<void*>(p.weight)) + n * p.in_features, 8 * byte, p.in_features, p.weight_vectors, out);
}

__global__ void __launch_bounds__(kSparse24Threads) sparse24_mask_kernel(const Sparse24Problem p) {
  const int64_t index = int64_t{blockIdx.x} * kSparse24Threads + threadIdx.x, words = p.mask_pitch / 4;
  const int64_t n = index / words, word = index % words;
  if (n >= p.out_features) return;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t byte = 4 * word + i;
    if (byte >= p.bytes) break;
    const uint32_t codes = ptx::load_global(p.metadata + n * p.bytes + byte);
    bits |= kept_by(codes & 15) << (8 * i);
    if (8 * byte + 4 < p.in_features) bits |= kept_by(codes >> 4) << (8 * i + 4);
  }
  ptx::store_global(p.bits + index, bits);
}

// Codes that do not occur, bits beyond the last group, and anything but +0 in a slot that holds nothing.
template <typename T>
__global__ void __launch_bounds__(kSparse24Threads) sparse24_validate_kernel(const Sparse24Problem p) {
  const int64_t index = int64_t{blockIdx.x} * kSparse24Threads + threadIdx.x, n = index / p.bytes, byte = index % p.bytes;
  Tally tally;
  if (n < p.out_features) {
    const uint32_t codes = ptx::load_global(p.metadata + index);
    bool good = true;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint32_t code = codes >> (4 * group) & 15;
      if (8 * byte + 4 * group >= p.in_features) {
        good = good && code == 0;
        continue;
      }
      good = good && (code == 1 || (code & 3) <= code >> 2);
      uint32_t position[2];
      slots_of(code, position);
      for (int slot = 0; slot < 2 && p.values != nullptr; ++slot)
        if (position[slot] == 4)
          good = good && is_plus_zero(static_cast<const T*>(p.values) + n * (p.in_features / 2) + 4 * byte + 2 * group + slot);
    }
    if (!good) tally.add(index);
  }
  tally.store(p.tallies, index / kWarp);
}

}  // namespace lors::cuda
