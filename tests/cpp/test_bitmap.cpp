// SPDX-License-Identifier: Apache-2.0
// Layout "bitmap" against loops written from the words of bitmap.h.
#include "layouts.h"

#include <lors/bitmap.h>

#include <limits>

namespace lors::test {
namespace {

constexpr int64_t kColumns[] = {1, 4, 8, 12, 31, 36, 60, 68, 128, 1028};
constexpr int64_t kRows[] = {1, 3, 7};

Mask random_mask(int64_t N, int64_t K, unsigned percent, std::mt19937_64& rng) {
  Mask mask{N, K, std::vector<bool>(size_t(N * K))};
  for (int64_t i = 0; i < N * K; ++i) mask.kept[size_t(i)] = rng() % 100 < percent;
  return mask;
}

std::vector<int64_t> offsets_of(const Mask& mask) {
  std::vector<int64_t> out = {0};
  for (int64_t n = 0; n < mask.out_features; ++n) {
    out.push_back(out.back());
    for (int64_t k = 0; k < mask.in_features; ++k) out.back() += mask.at(n, k);
  }
  return out;
}

std::pair<int64_t, int64_t> validate(int64_t N, int64_t K, int64_t count, const std::vector<uint32_t>& bits,
                                     const std::vector<int64_t>& offsets) {
  int64_t report[2] = {-1, -1};
  EXPECT_TRUE(bitmap_validate({N, K, count, bits.data(), offsets.data(), report}, &kPieces).ok());
  return {report[0], report[1]};
}
const std::pair<int64_t, int64_t> kValid{0, INT64_MAX};

TEST(Bitmap, RoundTrip) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kDTypes)
    for (const int64_t N : kRows)
      for (const int64_t K : kColumns)
        for (const unsigned percent : {0, 10, 50, 100}) {
          SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", " << N << "x" << K << ", " << percent << " %");
          const CpuHost* host = percent % 20 ? &kPieces : nullptr;
          const Mask mask = random_mask(N, K, percent, rng);
          const std::vector<uint32_t> bits = mask.bits();
          const std::vector<int64_t> want_offsets = offsets_of(mask);
          Elements weight = random_elements(dtype, N * K, rng, true), want(dtype, want_offsets.back()), dense(dtype, N * K);
          int64_t found = 0;
          for (int64_t i = 0; i < N * K; ++i) {
            if (rng() % 5 == 0) weight.set(i, rng() % 2 ? weight.sign() : 0);
            if (!mask.kept[size_t(i)]) continue;
            want.set(found++, weight.stored(i));
            dense.set(i, weight.stored(i));
          }
          Guarded<int64_t> offsets(N + 1);
          GuardedBytes values(int64_t(want.bytes.size())), back(int64_t(dense.bytes.size()));
          ASSERT_TRUE(bitmap_offsets({N, K, bits.data(), offsets.data()}, host).ok());
          EXPECT_EQ(offsets.values(), want_offsets);
          ASSERT_TRUE(
              bitmap_compress({N, K, weight.bytes.data(), dtype, bits.data(), want_offsets.data(), values.data()}, host).ok());
          EXPECT_EQ(values.values(), want.bytes);
          ASSERT_TRUE(
              bitmap_decompress({N, K, want.bytes.data(), dtype, bits.data(), want_offsets.data(), back.data()}, host).ok());
          EXPECT_EQ(back.values(), dense.bytes);
          EXPECT_EQ(validate(N, K, want.size(), bits, want_offsets), kValid);
          EXPECT_TRUE(offsets.intact() && values.intact() && back.intact());
        }
}

TEST(Bitmap, ThreadsDoNotChangeAnything) {
  std::mt19937_64 rng(3);
  const int64_t N = 203, K = 2052;
  const Mask mask = random_mask(N, K, 40, rng);
  const Elements weight = random_elements(DType::bfloat16, N * K, rng, false);
  const std::vector<uint32_t> bits = mask.bits();
  std::vector<int64_t> offsets(size_t(N + 1), -1);
  ASSERT_TRUE(bitmap_offsets({N, K, bits.data(), offsets.data()}, &kPieces).ok());
  EXPECT_EQ(offsets, offsets_of(mask));
  std::vector<std::vector<unsigned char>> values(2), back(2);
  for (const int i : {0, 1}) {
    const CpuHost* host = i ? &kPieces : nullptr;
    values[i].resize(size_t(2 * offsets.back()));
    back[i].resize(size_t(2 * N * K));
    ASSERT_TRUE(
        bitmap_compress({N, K, weight.bytes.data(), weight.dtype, bits.data(), offsets.data(), values[i].data()}, host).ok());
    ASSERT_TRUE(
        bitmap_decompress({N, K, values[i].data(), weight.dtype, bits.data(), offsets.data(), back[i].data()}, host).ok());
  }
  EXPECT_EQ(values[0], values[1]);
  EXPECT_EQ(back[0], back[1]);
  EXPECT_EQ(validate(N, K, offsets.back(), bits, offsets), kValid);
  offsets[100] = 5;
  EXPECT_EQ(validate(N, K, offsets.back(), bits, offsets), std::make_pair(int64_t{2}, int64_t{99}));
}

TEST(Bitmap, NothingAtAll) {
  std::vector<int64_t> offsets(4, 7);
  ASSERT_TRUE(bitmap_offsets({0, 8, nullptr, offsets.data()}, nullptr).ok());
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 7, 7, 7}));
  ASSERT_TRUE(bitmap_offsets({3, 0, nullptr, offsets.data()}, nullptr).ok());
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 0, 0, 0}));
  EXPECT_EQ(validate(0, 8, 0, {}, {0}), kValid);
  EXPECT_EQ(validate(3, 0, 0, {}, offsets), kValid);
  EXPECT_EQ(validate(0, 8, 0, {}, {1}), std::make_pair(int64_t{1}, int64_t{0})) << "without rows, still counted";
  EXPECT_EQ(validate(0, 8, 1, {}, {0}), std::make_pair(int64_t{1}, int64_t{0})) << "without rows, still counted";
  ASSERT_TRUE(bitmap_compress({3, 0, nullptr, DType::float32, nullptr, offsets.data(), nullptr}, nullptr).ok());
  ASSERT_TRUE(bitmap_decompress({3, 0, nullptr, DType::float32, nullptr, offsets.data(), nullptr}, nullptr).ok());
}

TEST(Bitmap, ValidateFindsWhatIsCorrupted) {
  std::mt19937_64 rng(2);
  for (const int64_t N : kRows)
    for (const int64_t K : kColumns) {
      SCOPED_TRACE(testing::Message() << N << "x" << K);
      const Mask mask = random_mask(N, K, 50, rng);
      const std::vector<uint32_t> bits = mask.bits();
      const std::vector<int64_t> offsets = offsets_of(mask);
      const int64_t count = offsets.back(), n = int64_t(rng() % uint64_t(N)), words = mask_words(K);
      const auto row = [](int64_t found, int64_t first) { return std::make_pair(found, first); };

      std::vector<uint32_t> bad_bits = bits;  // one bit more or less
      bad_bits[size_t(n * words)] ^= 1;
      EXPECT_EQ(validate(N, K, count, bad_bits, offsets), row(1, n));
      if (K % 32) {  // a bit beyond the last column, also one that makes up for a missing one
        bad_bits = bits;
        bad_bits[size_t(n * words + words - 1)] ^= 0x80000000u;
        EXPECT_EQ(validate(N, K, count, bad_bits, offsets), row(1, n));
        if (bits[size_t(n * words)] & 1) {
          bad_bits[size_t(n * words)] ^= 1;
          EXPECT_EQ(validate(N, K, count, bad_bits, offsets), row(1, n));
        }
      }
      std::vector<int64_t> shifted = offsets;  // right differences, wrong beginning
      for (int64_t& offset : shifted) offset += 5;
      EXPECT_EQ(validate(N, K, count + 5, bits, shifted), row(1, 0));
      EXPECT_EQ(validate(N, K, count, bits, shifted), N == 1 ? row(1, 0) : row(2, 0))
          << "and the last row disagrees with count";
      EXPECT_EQ(validate(N, K, count + 1, bits, offsets), row(1, N - 1));
      EXPECT_EQ(validate(N, K, -1, bits, offsets), row(1, N - 1));
      for (const int64_t absurd : {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), int64_t{-1}}) {
        std::vector<int64_t> bad = offsets;  // an offset in the middle belongs to two rows
        bad[size_t(n)] = absurd;
        const int64_t first = n == 0 ? 0 : n - 1;
        EXPECT_EQ(validate(N, K, count, bits, bad), row(n == 0 ? 1 : 2, first));
        bad = offsets;
        bad.back() = absurd;
        EXPECT_EQ(validate(N, K, count, bits, bad), row(1, N - 1));
        EXPECT_EQ(validate(N, K, absurd, bits, bad), row(1, N - 1));
      }
    }
}

}  // namespace
}  // namespace lors::test
