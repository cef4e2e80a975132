// SPDX-License-Identifier: Apache-2.0
// The mask of a 2:4 weight as bits.
#include <lors/sparse24.h>

#include <algorithm>

#include "sparse24_codes.h"
#include "workspace.h"

namespace lors {

Status sparse24_mask(const Sparse24MaskArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, bytes = sparse24_metadata_bytes(K), words = mask_words(K);
  cpu::parallel_for(host, args.out_features, 1 + 262144 / (K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      uint32_t* mask = args.mask + n * words;
      std::fill(mask, mask + words, 0u);
      for (int64_t i = 0; i < bytes; ++i)
        mask[i / 4] |= uint32_t(kSparse24Codes.kept_of_byte[args.metadata[n * bytes + i]]) << (i % 4 * 8);
      if (K % 8) mask[words - 1] &= (uint32_t{1} << (K % 32)) - 1;  // the code 0 beyond the last group keeps nothing
    }
  });
  return {};
}

}  // namespace lors
