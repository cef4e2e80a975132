// SPDX-License-Identifier: Apache-2.0
// Layout "bitmap" on the CPU: offsets, compress, decompress, validate. Weights are moved as bit patterns, so that a NaN keeps
// its payload. Only validate reads offsets that may be anything, and it follows none of them.
#include <lors/bitmap.h>

#include <algorithm>
#include <bit>

#include "tally.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

namespace {

int64_t grain(int64_t in_features) { return 1 + 65536 / (in_features + 1); }

template <typename F>
void with_bits(DType dtype, F f) {
  switch (dtype_size(dtype)) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

int64_t count_kept(const uint32_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += std::popcount(bits[w]);
  return count;
}

}  // namespace

Status bitmap_offsets(const BitmapOffsetsArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, words = mask_words(args.in_features);
  parallel_for(host, N, 1 + 4 * grain(args.in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) args.row_offsets[n + 1] = count_kept(args.bits + n * words, words);
  });
  args.row_offsets[0] = 0;
  for (int64_t n = 0; n < N; ++n) args.row_offsets[n + 1] += args.row_offsets[n];
  return {};
}

Status bitmap_compress(const BitmapCompressArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K);
  with_bits(args.dtype, [&]<typename Bits>(Bits) {
    parallel_for(host, args.out_features, grain(K), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Bits* src = static_cast<const Bits*>(args.weight) + n * K;
        Bits* dst = static_cast<Bits*>(args.values) + args.row_offsets[n];
        for (int64_t w = 0; w < words; ++w)
          for (uint32_t kept = args.bits[n * words + w]; kept; kept &= kept - 1) {
            const Bits value = src[w * 32 + std::countr_zero(kept)];
            *dst++ = Bits(value << 1) == 0 ? Bits(0) : value;
          }
      }
    });
  });
  return {};
}

Status bitmap_decompress(const BitmapDecompressArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, words = mask_words(K);
  with_bits(args.dtype, [&]<typename Bits>(Bits) {
    parallel_for(host, args.out_features, grain(K), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Bits* src = static_cast<const Bits*>(args.values) + args.row_offsets[n];
        Bits* dst = static_cast<Bits*>(args.weight) + n * K;
        std::fill(dst, dst + K, Bits(0));
        for (int64_t w = 0; w < words; ++w)
          for (uint32_t kept = args.bits[n * words + w]; kept; kept &= kept - 1) dst[w * 32 + std::countr_zero(kept)] = *src++;
      }
    });
  });
  return {};
}

Status bitmap_validate(const BitmapValidateArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, K = args.in_features, words = mask_words(K);
  const uint32_t beyond = K % 32 ? ~uint32_t{0} << (K % 32) : 0;
  Tally tally;
  parallel_for(host, N, 1 + 4 * grain(K), [&](int64_t begin, int64_t end) {
    int64_t found = 0, first = INT64_MAX;
    for (int64_t n = begin; n < end; ++n) {
      const uint32_t* bits = args.bits + n * words;
      // Unsigned, because the difference of absurd offsets overflows.
      const uint64_t count = uint64_t(args.row_offsets[n + 1]) - uint64_t(args.row_offsets[n]);
      bool good = count == uint64_t(count_kept(bits, words));
      if (beyond) good &= (bits[words - 1] & beyond) == 0;
      if (n == 0) good &= args.row_offsets[0] == 0;
      if (n == N - 1) good &= args.row_offsets[N] == args.count;
      if (good) continue;
      first = std::min(first, n);
      ++found;
    }
    tally.add(found, first);
  });
  // Without rows nothing else speaks for the one offset there is.
  if (N == 0 && (args.row_offsets[0] != 0 || args.count != 0)) tally.add(1, 0);
  args.report[0] = tally.count();
  args.report[1] = tally.first();
  return {};
}

}  // namespace lors
