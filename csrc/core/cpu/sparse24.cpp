// SPDX-License-Identifier: Apache-2.0
// Layout "2:4" on the CPU: inspect, compress, decompress, mask, validate. Weights are moved as bit patterns, so that a NaN
// keeps its payload; nothing here computes with them (sparse24_merge is in merge.cpp).
#include <lors/sparse24.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels.h"
#include "sparse24_codes.h"
#include "tally.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

namespace {

constexpr int64_t kBlockColumns = 1024;  // columns whose kept bits are in hand at once
constexpr int64_t kBlockWords = kBlockColumns / 32;

int64_t grain(int64_t in_features) { return 1 + 65536 / (in_features + 1); }

// Calls f with an unsigned integer as wide as an element of `dtype`.
template <typename F>
void with_bits(DType dtype, F f) {
  switch (dtype_size(dtype)) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

template <typename Bits>
constexpr Bits positive_zero(Bits x) {
  return Bits(x << 1) == 0 ? Bits(0) : x;
}

struct Weight {
  int64_t in_features;
  const void* weight;
  DType dtype;
  const uint32_t* mask;
};

// The kept bits of columns [k, k + columns) of row n; k is a multiple of 32. `buffer` has kBlockWords.
const uint32_t* kept_bits(const Weight& w, int64_t n, int64_t k, int64_t columns, uint32_t* buffer) {
  if (w.mask) return w.mask + n * mask_words(w.in_features) + k / 32;
  const int64_t size = dtype_size(w.dtype);
  kernels().nonzero(static_cast<const char*>(w.weight) + (n * w.in_features + k) * size, size, columns, buffer);
  return buffer;
}

// Where at least three of four are set; for the groups of a word, at the lowest bit of each.
uint32_t three_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return (a & b & (c | d)) | (c & d & (a | b)); }
uint32_t offending_groups(uint32_t kept) { return three_of(kept, kept >> 1, kept >> 2, kept >> 3) & 0x11111111u; }

}  // namespace

Status sparse24_inspect(const Sparse24InspectArgs& args, const CpuHost* host) {
  const int64_t N = args.out_features, K = args.in_features;
  const Weight weight{K, args.weight, args.weight_dtype, args.mask};
  Tally groups, columns;
  parallel_for(host, (N + 3) / 4, 1 + grain(K) / 4, [&](int64_t begin, int64_t end) {
    int64_t found = 0, first = INT64_MAX, across = 0;
    uint32_t buffer[4][kBlockWords];
    for (int64_t n = 4 * begin; n < std::min(4 * end, N); n += 4)
      for (int64_t k = 0; k < K; k += kBlockColumns) {
        const int64_t width = std::min(kBlockColumns, K - k), rows = std::min<int64_t>(4, N - n);
        const uint32_t* kept[4];
        for (int64_t i = 0; i < rows; ++i) kept[i] = kept_bits(weight, n + i, k, width, buffer[i]);
        for (int64_t w = 0; w < mask_words(width); ++w) {
          uint32_t word[4] = {};
          for (int64_t i = 0; i < rows; ++i) {
            word[i] = kept[i][w];
            const uint32_t offending = offending_groups(word[i]);
            if (!offending) continue;
            found += std::popcount(offending);
            first = std::min(first, (n + i) * (K / 4) + (k + w * 32 + std::countr_zero(offending)) / 4);
          }
          across += std::popcount(three_of(word[0], word[1], word[2], word[3]));
        }
      }
    groups.add(found, first);
    columns.add(across, 0);
  });
  *args.report = {groups.count(), groups.first(), columns.count()};
  return {};
}

Status sparse24_compress(const Sparse24CompressArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, bytes = sparse24_metadata_bytes(K);
  const Weight weight{K, args.weight, args.weight_dtype, args.mask};
  with_bits(args.weight_dtype, [&]<typename Bits>(Bits) {
    parallel_for(host, args.out_features, grain(K), [&](int64_t begin, int64_t end) {
      uint32_t buffer[kBlockWords];
      for (int64_t n = begin; n < end; ++n) {
        const Bits* src = static_cast<const Bits*>(args.weight) + n * K;
        Bits* slots = static_cast<Bits*>(args.values) + n * (K / 2);
        uint8_t* metadata = args.metadata ? args.metadata + n * bytes : nullptr;
        for (int64_t k = 0; k < K; k += kBlockColumns) {
          const int64_t last = std::min(k + kBlockColumns, K);
          const uint32_t* kept = kept_bits(weight, n, k, last - k, buffer);
          for (int64_t j = k; j < last; j += 4) {
            const unsigned code = kSparse24Codes.of_pattern[kept[(j - k) / 32] >> (j % 32) & 15];
            const Sparse24Code& group = kSparse24Codes.of_code[code];
            for (int s = 0; s < 2; ++s)
              slots[j / 2 + s] = group.kept >> group.slot[s] & 1 ? positive_zero(src[j + group.slot[s]]) : Bits(0);
            if (metadata) metadata[j / 8] = uint8_t(j % 8 ? metadata[j / 8] | code << 4 : code);
          }
        }
      }
    });
  });
  return {};
}

Status sparse24_decompress(const Sparse24DecompressArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, bytes = sparse24_metadata_bytes(K);
  with_bits(args.dtype, [&]<typename Bits>(Bits) {
    parallel_for(host, args.out_features, grain(K), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Bits* slots = static_cast<const Bits*>(args.values) + n * (K / 2);
        const uint8_t* metadata = args.metadata + n * bytes;
        Bits* dst = static_cast<Bits*>(args.weight) + n * K;
        for (int64_t k = 0; k < K; k += 4) {
          const Sparse24Code& group = kSparse24Codes.of_code[metadata[k / 8] >> (k % 8) & 15];
          Bits four[4] = {};
          for (int s = 0; s < 2; ++s) four[group.slot[s]] = group.kept >> group.slot[s] & 1 ? slots[k / 2 + s] : Bits(0);
          std::memcpy(dst + k, four, sizeof(four));
        }
      }
    });
  });
  return {};
}

Status sparse24_mask(const Sparse24MaskArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, bytes = sparse24_metadata_bytes(K), words = mask_words(K);
  parallel_for(host, args.out_features, 1 + 4 * grain(K), [&](int64_t begin, int64_t end) {
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

Status sparse24_validate(const Sparse24ValidateArgs& args, const CpuHost* host) {
  const int64_t K = args.in_features, bytes = sparse24_metadata_bytes(K);
  Tally tally;
  with_bits(args.dtype, [&]<typename Bits>(Bits) {
    parallel_for(host, args.out_features, grain(K), [&](int64_t begin, int64_t end) {
      int64_t found = 0, first = INT64_MAX;
      for (int64_t n = begin; n < end; ++n) {
        const Bits* slots = args.values ? static_cast<const Bits*>(args.values) + n * (K / 2) : nullptr;
        const uint8_t* metadata = args.metadata + n * bytes;
        for (int64_t i = 0; i < bytes; ++i) {
          bool good = true;
          for (int64_t k = 8 * i; k < 8 * i + 8; k += 4) {
            const unsigned code = metadata[i] >> (k % 8) & 15;
            if (k >= K) {
              good &= code == 0;
              continue;
            }
            const Sparse24Code& group = kSparse24Codes.of_code[code];
            good &= group.valid;
            if (!slots) continue;
            for (int s = 0; s < 2; ++s) good &= (group.kept >> group.slot[s] & 1) || slots[k / 2 + s] == 0;
          }
          if (good) continue;
          first = std::min(first, n * bytes + i);
          ++found;
        }
      }
      tally.add(found, first);
    });
  });
  args.report[0] = tally.count();
  args.report[1] = tally.first();
  return {};
}

}  // namespace lors
