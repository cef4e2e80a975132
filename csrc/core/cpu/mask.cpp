// SPDX-License-Identifier: Apache-2.0
// A mask between one byte and one bit per weight, and the mask of the nonzero weights.
#include <lors/mask.h>

#include "kernels.h"
#include "workspace.h"

namespace lors {

Status mask_pack(const MaskPackArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K);
  cpu::parallel_for(host, args.out_features, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t w = 0; w < words; ++w) {
        const int64_t columns = K - w * 32 < 32 ? K - w * 32 : 32;
        uint32_t word = 0;
        for (int64_t j = 0; j < columns; ++j) word |= uint32_t(args.mask[n * K + w * 32 + j] != 0) << j;
        args.bits[n * words + w] = word;
      }
  });
  return {};
}

Status mask_unpack(const MaskUnpackArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K);
  cpu::parallel_for(host, args.out_features, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t k = 0; k < K; ++k) args.mask[n * K + k] = (args.bits[n * words + k / 32] >> (k % 32)) & 1;
  });
  return {};
}

Status mask_nonzero(const MaskNonzeroArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K), size = dtype_size(args.dtype);
  const auto* weight = static_cast<const char*>(args.weight);
  cpu::parallel_for(host, args.out_features, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) cpu::kernels().nonzero(weight + n * K * size, size, K, args.bits + n * words);
  });
  return {};
}

}  // namespace lors
