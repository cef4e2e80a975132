// SPDX-License-Identifier: Apache-2.0
// Gathers the kept weights of a dense weight. They are moved as bit patterns, so that a NaN keeps its payload.
#include <lors/compress.h>

#include <bit>

#include "workspace.h"

namespace lors {
namespace {

template <typename Bits>
void compress_as(const CompressArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K);
  cpu::parallel_for(host, args.out_features, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Bits* src = static_cast<const Bits*>(args.weight) + n * K;
      Bits* dst = static_cast<Bits*>(args.values) + args.row_offsets[n];
      for (int64_t w = 0; w < words; ++w)
        for (uint32_t kept = args.mask[n * words + w]; kept; kept &= kept - 1) {
          const Bits value = src[w * 32 + std::countr_zero(kept)];
          *dst++ = Bits(value << 1) == 0 ? Bits(0) : value;
        }
    }
  });
}

}  // namespace

Status compress(const CompressArgs& args, const CpuHost* host) {
  switch (dtype_size(args.dtype)) {
    case 2: compress_as<uint16_t>(args, host); break;
    case 4: compress_as<uint32_t>(args, host); break;
    default: compress_as<uint64_t>(args, host);
  }
  return {};
}

}  // namespace lors
