// SPDX-License-Identifier: Apache-2.0
// What the tests of the compressed layouts share: weights as bit patterns of any dtype, random masks, outputs between red
// zones, and a pool of threads.
#pragma once

#include <gtest/gtest.h>
#include <lors/types.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace lors::test {

constexpr DType kDTypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

// `count` elements of one dtype, exactly sized, so that a sanitizer sees the first byte read beyond them.
struct Elements {
  Elements(DType dtype, int64_t count) : dtype(dtype), bytes(size_t(count * dtype_size(dtype))) {}
  int64_t size() const { return int64_t(bytes.size()) / dtype_size(dtype); }
  uint64_t get(int64_t i) const {
    uint64_t out = 0;
    std::memcpy(&out, bytes.data() + i * dtype_size(dtype), size_t(dtype_size(dtype)));
    return out;
  }
  void set(int64_t i, uint64_t bits) { std::memcpy(bytes.data() + i * dtype_size(dtype), &bits, size_t(dtype_size(dtype))); }
  uint64_t sign() const { return uint64_t{1} << (8 * dtype_size(dtype) - 1); }
  bool is_zero(int64_t i) const { return (get(i) & ~sign()) == 0; }
  // Kept values as every layout stores them.
  uint64_t stored(int64_t i) const { return is_zero(i) ? 0 : get(i); }

  DType dtype;
  std::vector<unsigned char> bytes;
};

inline int fraction_bits(DType dtype) {
  switch (dtype) {
    case DType::float64: return 52;
    case DType::float32: return 23;
    case DType::bfloat16: return 7;
    default: return 10;
  }
}

// Random numbers between 1/4 and 4 of either sign, and now and then an infinity or a NaN if `special`.
inline Elements random_elements(DType dtype, int64_t count, std::mt19937_64& rng, bool special) {
  Elements out(dtype, count);
  const int fraction = fraction_bits(dtype), exponent_bits = int(dtype_size(dtype)) * 8 - 1 - fraction;
  const uint64_t bias = (uint64_t{1} << (exponent_bits - 1)) - 1, all_ones = (uint64_t{1} << exponent_bits) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t draw = rng();
    uint64_t bits = (bias - 2 + draw % 4) << fraction | (rng() & ((uint64_t{1} << fraction) - 1));
    if (special && draw % 41 == 0) bits = all_ones << fraction | (draw % 2) << (fraction - 1);
    out.set(i, bits | (draw >> 40 & 1 ? out.sign() : 0));
  }
  return out;
}

// A mask as one bool per weight, and as the bits the core takes.
struct Mask {
  int64_t out_features, in_features;
  std::vector<bool> kept;  // [N, K]
  bool at(int64_t n, int64_t k) const { return kept[size_t(n * in_features + k)]; }
  std::vector<uint32_t> bits() const {
    const int64_t words = mask_words(in_features);
    std::vector<uint32_t> out(size_t(out_features * words));
    for (int64_t n = 0; n < out_features; ++n)
      for (int64_t k = 0; k < in_features; ++k)
        if (at(n, k)) out[size_t(n * words + k / 32)] |= uint32_t{1} << (k % 32);
    return out;
  }
};

inline Mask random_mask(int64_t N, int64_t K, unsigned percent, std::mt19937_64& rng) {
  Mask mask{N, K, std::vector<bool>(size_t(N * K))};
  for (int64_t i = 0; i < N * K; ++i) mask.kept[size_t(i)] = rng() % 100 < percent;
  return mask;
}

inline std::vector<int64_t> offsets_of(const Mask& mask) {
  std::vector<int64_t> out = {0};
  for (int64_t n = 0; n < mask.out_features; ++n) {
    out.push_back(out.back());
    for (int64_t k = 0; k < mask.in_features; ++k) out.back() += mask.at(n, k);
  }
  return out;
}

// The kept weights row by row, as a bitmap stores them.
inline Elements kept_values(const Elements& weight, const Mask& mask) {
  Elements out(weight.dtype, offsets_of(mask).back());
  for (int64_t i = 0, at = 0; i < weight.size(); ++i)
    if (mask.kept[size_t(i)]) out.set(at++, weight.stored(i));
  return out;
}

// Layout 2:4 of a weight, by loops from the words of sparse24.h.
struct Encoded {
  Elements values;
  std::vector<uint8_t> metadata;
};

inline Encoded encode(const Elements& weight, const Mask& mask) {
  const int64_t N = mask.out_features, K = mask.in_features, bytes = sparse24_metadata_bytes(K);
  Encoded out{Elements(weight.dtype, N * K / 2), std::vector<uint8_t>(size_t(N * bytes))};
  for (int64_t n = 0; n < N; ++n)
    for (int64_t g = 0; g < K / 4; ++g) {
      std::vector<int> kept;
      for (int j = 0; j < 4; ++j)
        if (mask.at(n, 4 * g + j)) kept.push_back(j);
      const int64_t from = n * K + 4 * g, slot = n * (K / 2) + 2 * g;
      int first = 1, second = 0;
      if (kept.size() == 2) {
        first = kept[0];
        second = kept[1];
        out.values.set(slot, weight.stored(from + first));
        out.values.set(slot + 1, weight.stored(from + second));
      } else if (kept.size() == 1) {
        first = second = kept[0];
        out.values.set(first == 3 ? slot + 1 : slot, weight.stored(from + first));
      }
      out.metadata[size_t(n * bytes + g / 2)] |= uint8_t((first | second << 2) << (g % 2 * 4));
    }
  return out;
}

// Of every group of four along K as many kept as a die says, at most `most`.
inline Mask random_groups(int64_t N, int64_t K, int most, std::mt19937_64& rng) {
  Mask mask{N, K, std::vector<bool>(size_t(N * K))};
  for (int64_t group = 0; group < N * K; group += 4) {
    int positions[4] = {0, 1, 2, 3};
    std::shuffle(positions, positions + 4, rng);
    const int count = int(rng() % unsigned(most + 1));
    for (int j = 0; j < count; ++j) mask.kept[size_t(group + positions[j])] = true;
  }
  return mask;
}

// An output between two red zones, overwritten with a pattern beforehand; `shift` elements beyond an address that every vector
// store is aligned at.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t shift = 0)
      : bytes_(count * int64_t(sizeof(T))), memory_(size_t(bytes_ + shift * int64_t(sizeof(T)) + 2 * kZone), kPattern) {
    const int64_t beyond = int64_t(reinterpret_cast<uintptr_t>(memory_.data()) % 64);
    begin_ = kZone - beyond + shift * int64_t(sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(memory_.data() + begin_); }
  std::vector<T> values() { return {data(), data() + bytes_ / int64_t(sizeof(T))}; }
  bool intact() const {
    const auto untouched = [](unsigned char byte) { return byte == kPattern; };
    return std::all_of(memory_.begin(), memory_.begin() + begin_, untouched) &&
           std::all_of(memory_.begin() + begin_ + bytes_, memory_.end(), untouched);
  }

 private:
  static constexpr int64_t kZone = 256;
  static constexpr unsigned char kPattern = 0xa5;
  int64_t bytes_, begin_ = 0;
  std::vector<unsigned char> memory_;
};
using GuardedBytes = Guarded<unsigned char>;

// A thread pool that divides the work into as many pieces as the grain allows, each on its own thread.
inline void run_in_pieces(int64_t count, int64_t grain, CpuHost::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += grain)
    threads.emplace_back(body, context, begin, std::min(begin + grain, count));
  for (std::thread& thread : threads) thread.join();
}
inline constexpr CpuHost kPieces{run_in_pieces, nullptr, nullptr};

}  // namespace lors::test
