// SPDX-License-Identifier: Apache-2.0
// The mask of a 2:4 weight [N, K] as bits, from its metadata (lors/sparse24.h): one thread per 32 columns. Launched by mask.cu.
#pragma once

#include "operands.cuh"

namespace lors::cuda {

constexpr int kMaskThreads = 256;

struct MaskProblem {
  const uint8_t* metadata;            // [N, bytes]
  uint32_t* mask;                     // [N, words]
  int64_t out_features, in_features;  // N, K
  int64_t bytes, words;               // ceil(K / 8), ceil(K / 32)
  bool whole_words;                   // metadata can be read four bytes at a time
};

__global__ void __launch_bounds__(kMaskThreads) sparse24_mask_kernel(const MaskProblem p) {
  const int64_t index = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x, n = index / p.words, word = index % p.words;
  if (n >= p.out_features) return;
  uint32_t codes = 0, bits = 0;
  if (p.whole_words) {
    codes = ptx::load_global(reinterpret_cast<const uint32_t*>(p.metadata) + index);
  } else {
    for (int64_t byte = 4 * word; byte < 4 * word + 4 && byte < p.bytes; ++byte)
      codes |= uint32_t{ptx::load_global(p.metadata + n * p.bytes + byte)} << (8 * (byte - 4 * word));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (32 * word + 4 * i < p.in_features) bits |= kept_by(codes >> (4 * i) & 15) << (4 * i);
  ptx::store_global(p.mask + index, bits);
}

}  // namespace lors::cuda
