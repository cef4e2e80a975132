// SPDX-License-Identifier: Apache-2.0
// Layout "2:4" against loops written from the words of sparse24.h.
#include "layouts.h"

#include <lors/mask.h>
#include <lors/sparse24.h>

namespace lors::test {
namespace {

constexpr int64_t kColumns[] = {4, 8, 12, 36, 60, 68, 128, 1028};
constexpr int64_t kRows[] = {1, 3, 7};

struct Encoded {
  Elements values;
  std::vector<uint8_t> metadata;
};

Encoded encode(const Elements& weight, const Mask& mask) {
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

std::pair<int64_t, int64_t> validate(int64_t N, int64_t K, const Elements* values, DType dtype,
                                     const std::vector<uint8_t>& metadata) {
  int64_t report[2] = {-1, -1};
  EXPECT_TRUE(
      sparse24_validate({N, K, values ? values->bytes.data() : nullptr, dtype, metadata.data(), report}, &kPieces).ok());
  return {report[0], report[1]};
}
const std::pair<int64_t, int64_t> kValid{0, INT64_MAX};

void expect_round_trip(const Elements& weight, const Mask& mask, bool explicit_mask, const CpuHost* host) {
  const int64_t N = mask.out_features, K = mask.in_features, size = dtype_size(weight.dtype);
  const int64_t bytes = sparse24_metadata_bytes(K);
  const std::vector<uint32_t> bits = mask.bits();
  const Encoded want = encode(weight, mask);
  GuardedBytes values(N * K / 2 * size), without(N * K / 2 * size), back(N * K * size), metadata(N * bytes);
  Guarded<uint32_t> recovered(N * mask_words(K));
  const uint32_t* given = explicit_mask ? bits.data() : nullptr;

  ASSERT_TRUE(sparse24_compress({N, K, weight.bytes.data(), weight.dtype, given, values.data(), metadata.data()}, host).ok());
  EXPECT_EQ(values.values(), want.values.bytes);
  EXPECT_EQ(metadata.values(), want.metadata);
  ASSERT_TRUE(sparse24_compress({N, K, weight.bytes.data(), weight.dtype, given, without.data(), nullptr}, host).ok());
  EXPECT_EQ(without.values(), want.values.bytes);
  EXPECT_EQ(validate(N, K, &want.values, weight.dtype, want.metadata), kValid);

  ASSERT_TRUE(sparse24_mask({N, K, want.metadata.data(), recovered.data()}, host).ok());
  EXPECT_EQ(recovered.values(), bits);
  ASSERT_TRUE(
      sparse24_decompress({N, K, want.values.bytes.data(), weight.dtype, want.metadata.data(), back.data()}, host).ok());
  Elements dense(weight.dtype, N * K);
  for (int64_t i = 0; i < N * K; ++i) dense.set(i, mask.kept[size_t(i)] ? weight.stored(i) : 0);
  EXPECT_EQ(back.values(), dense.bytes);
  EXPECT_TRUE(values.intact() && without.intact() && back.intact() && metadata.intact() && recovered.intact());
}

TEST(Sparse24, RoundTripWithAMask) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kDTypes)
    for (const int64_t N : kRows)
      for (const int64_t K : kColumns) {
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", " << N << "x" << K);
        // Zeros of both signs are kept too, and what is not kept is anything.
        Elements weight = random_elements(dtype, N * K, rng, true);
        for (int64_t i = 0; i < N * K; ++i)
          if (rng() % 5 == 0) weight.set(i, rng() % 2 ? weight.sign() : 0);
        expect_round_trip(weight, random_groups(N, K, 2, rng), true, K % 8 ? nullptr : &kPieces);
      }
}

TEST(Sparse24, RoundTripOfTheNonzeros) {
  std::mt19937_64 rng(2);
  for (const DType dtype : kDTypes)
    for (const int64_t N : kRows)
      for (const int64_t K : kColumns) {
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", " << N << "x" << K);
        const Mask mask = random_groups(N, K, 2, rng);
        Elements weight = random_elements(dtype, N * K, rng, true);
        for (int64_t i = 0; i < N * K; ++i)
          if (!mask.kept[size_t(i)]) weight.set(i, rng() % 2 ? weight.sign() : 0);
        expect_round_trip(weight, mask, false, K % 8 ? &kPieces : nullptr);
      }
}

TEST(Sparse24, NothingAtAll) {
  Sparse24Report report{7, 7, 7};
  int64_t found[2] = {7, 7};
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{0, 8}, {3, 0}}) {
    ASSERT_TRUE(sparse24_inspect({N, K, nullptr, DType::float32, nullptr, &report}, &kPieces).ok());
    EXPECT_EQ(report.offending_groups, 0);
    EXPECT_EQ(report.first_offender, INT64_MAX);
    EXPECT_EQ(report.offending_columns, 0);
    ASSERT_TRUE(sparse24_compress({N, K, nullptr, DType::float32, nullptr, nullptr, nullptr}, &kPieces).ok());
    ASSERT_TRUE(sparse24_decompress({N, K, nullptr, DType::float32, nullptr, nullptr}, &kPieces).ok());
    ASSERT_TRUE(sparse24_mask({N, K, nullptr, nullptr}, &kPieces).ok());
    ASSERT_TRUE(sparse24_validate({N, K, nullptr, DType::float32, nullptr, found}, &kPieces).ok());
    EXPECT_EQ(found[0], 0);
    EXPECT_EQ(found[1], INT64_MAX);
  }
}

TEST(Sparse24, Inspect) {
  std::mt19937_64 rng(3);
  for (const DType dtype : kDTypes)
    for (const int64_t N : {1, 3, 4, 7, 9})
      for (const int64_t K : kColumns)
        for (const int most : {2, 3, 4})
          for (const bool explicit_mask : {false, true}) {
            Mask mask = random_groups(N, K, 2, rng);
            if (most > 2) {  // in one row only, so that the first offender is not always in the first
              const Mask more = random_groups(1, K, most, rng);
              std::copy(more.kept.begin(), more.kept.end(), mask.kept.begin() + int64_t(rng() % uint64_t(N)) * K);
            }
            Elements weight = random_elements(dtype, N * K, rng, true);
            for (int64_t i = 0; i < N * K; ++i)
              if (explicit_mask ? rng() % 2 : !mask.kept[size_t(i)]) weight.set(i, rng() % 2 ? weight.sign() : 0);
            Sparse24Report want{0, INT64_MAX, 0};
            for (int64_t n = 0; n < N; ++n)
              for (int64_t g = 0; g < K / 4; ++g) {
                int kept = 0;
                for (int j = 0; j < 4; ++j) kept += mask.at(n, 4 * g + j);
                if (kept <= 2) continue;
                ++want.offending_groups;
                want.first_offender = std::min(want.first_offender, n * (K / 4) + g);
              }
            for (int64_t n = 0; n < N; n += 4)
              for (int64_t k = 0; k < K; ++k) {
                int kept = 0;
                for (int64_t i = n; i < std::min(n + 4, N); ++i) kept += mask.at(i, k);
                want.offending_columns += kept > 2;
              }
            const std::vector<uint32_t> bits = mask.bits();
            for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces}) {
              Sparse24Report report{-1, -1, -1};
              ASSERT_TRUE(
                  sparse24_inspect({N, K, weight.bytes.data(), dtype, explicit_mask ? bits.data() : nullptr, &report}, host)
                      .ok());
              EXPECT_EQ(report.offending_groups, want.offending_groups);
              EXPECT_EQ(report.first_offender, want.first_offender);
              EXPECT_EQ(report.offending_columns, want.offending_columns);
            }
          }
}

// Every code in either half of a byte: does it occur, which slots may hold values, where do they go.
TEST(Sparse24, EveryCode) {
  for (int code = 0; code < 16; ++code) {
    const int first = code & 3, second = code >> 2;
    const bool none = first == 1 && second == 0, occurs = first <= second || none;
    const bool slot_used[2] = {!none && (first < second || first != 3), !none && (first < second || first == 3)};
    for (const int half : {0, 1})
      for (const DType dtype : kDTypes)
        for (const int filled : {0, 1, 2, 3}) {
          SCOPED_TRACE(testing::Message() << "code " << code << " half " << half << " slots filled " << filled);
          Elements values(dtype, 4);
          const std::vector<uint8_t> metadata = {uint8_t(half ? code << 4 | 1 : code | 1 << 4)};
          bool good = occurs;
          for (const int s : {0, 1})
            if (filled >> s & 1) {
              // A filler of -0.0 is not +0 either.
              values.set(2 * half + s, slot_used[s] ? 0x3c01u : values.sign());
              good &= slot_used[s];
            }
          const std::pair<int64_t, int64_t> invalid{1, 0};
          EXPECT_EQ(validate(1, 8, &values, dtype, metadata), good ? kValid : invalid);
          EXPECT_EQ(validate(1, 8, nullptr, dtype, metadata), occurs ? kValid : invalid);
          if (!good) continue;
          Elements weight(dtype, 8), want(dtype, 8);
          ASSERT_TRUE(
              sparse24_decompress({1, 8, values.bytes.data(), dtype, metadata.data(), weight.bytes.data()}, nullptr).ok());
          if (slot_used[0]) want.set(4 * half + first, values.get(2 * half));
          if (slot_used[1]) want.set(4 * half + second, values.get(2 * half + 1));
          EXPECT_EQ(weight.bytes, want.bytes);
          uint32_t mask = 0xffffffff, kept = none ? 0 : 1u << first | 1u << second;
          ASSERT_TRUE(sparse24_mask({1, 8, metadata.data(), &mask}, nullptr).ok());
          EXPECT_EQ(mask, kept << (4 * half));
        }
  }
}

TEST(Sparse24, ValidateFindsWhatIsCorrupted) {
  std::mt19937_64 rng(4);
  for (const DType dtype : kDTypes)
    for (const int64_t N : kRows)
      for (const int64_t K : kColumns) {
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", " << N << "x" << K);
        const int64_t bytes = sparse24_metadata_bytes(K);
        const Mask mask = random_groups(N, K, 1, rng);  // every group has a filler
        const Encoded good = encode(random_elements(dtype, N * K, rng, true), mask);
        // Each byte of metadata: a code that does not occur, or a bit beyond the last group.
        const int64_t at = int64_t(rng() % uint64_t(N * bytes));
        Encoded bad = good;
        const bool last = K % 8 && at % bytes == bytes - 1;
        bad.metadata[size_t(at)] = uint8_t(last ? bad.metadata[size_t(at)] | 0x10 : (bad.metadata[size_t(at)] & 0x0f) | 0x20);
        EXPECT_EQ(validate(N, K, nullptr, dtype, bad.metadata), std::make_pair(int64_t{1}, at));
        // Each slot without a kept weight.
        bad = good;
        int64_t slot = int64_t(rng() % uint64_t(N * K / 2));
        while (good.values.get(slot) != 0) slot = (slot + 1) % (N * K / 2);
        bad.values.set(slot, rng() % 2 ? bad.values.sign() : 1);
        const int64_t byte = slot / (K / 2) * bytes + slot % (K / 2) / 4;
        EXPECT_EQ(validate(N, K, &bad.values, dtype, bad.metadata), std::make_pair(int64_t{1}, byte));
        EXPECT_EQ(validate(N, K, nullptr, dtype, bad.metadata), kValid);
        // All of it, in every row.
        bad.metadata.assign(bad.metadata.size(), 0x22);
        EXPECT_EQ(validate(N, K, &bad.values, dtype, bad.metadata), std::make_pair(N * bytes, int64_t{0}));
      }
}

// Enough rows to be shared out, with offenders in several pieces.
TEST(Sparse24, ThreadsDoNotChangeAnything) {
  std::mt19937_64 rng(6);
  const int64_t N = 203, K = 2052;
  const Mask mask = random_groups(N, K, 3, rng);
  const Elements weight = random_elements(DType::bfloat16, N * K, rng, false);
  const std::vector<uint32_t> bits = mask.bits();
  Sparse24Report reports[2];
  std::vector<std::vector<unsigned char>> values(2), back(2);
  std::vector<std::vector<uint8_t>> metadata(2);
  std::vector<std::vector<uint32_t>> masks(2);
  int64_t found[2][2];
  for (const int i : {0, 1}) {
    const CpuHost* host = i ? &kPieces : nullptr;
    values[i].resize(size_t(N * K));
    back[i].resize(size_t(2 * N * K));
    metadata[i].resize(size_t(N * sparse24_metadata_bytes(K)));
    masks[i].resize(size_t(N * mask_words(K)));
    const void* dense = weight.bytes.data();
    ASSERT_TRUE(sparse24_inspect({N, K, dense, weight.dtype, bits.data(), &reports[i]}, host).ok());
    ASSERT_TRUE(sparse24_compress({N, K, dense, weight.dtype, bits.data(), values[i].data(), metadata[i].data()}, host).ok());
    ASSERT_TRUE(sparse24_decompress({N, K, values[i].data(), weight.dtype, metadata[i].data(), back[i].data()}, host).ok());
    ASSERT_TRUE(sparse24_mask({N, K, metadata[i].data(), masks[i].data()}, host).ok());
    const std::vector<uint8_t> bad(metadata[i].size(), 0x22);
    ASSERT_TRUE(sparse24_validate({N, K, nullptr, weight.dtype, bad.data(), found[i]}, host).ok());
  }
  EXPECT_GT(reports[0].offending_groups, 0);
  EXPECT_EQ(reports[0].offending_groups, reports[1].offending_groups);
  EXPECT_EQ(reports[0].first_offender, reports[1].first_offender);
  EXPECT_EQ(reports[0].offending_columns, reports[1].offending_columns);
  EXPECT_EQ(values[0], values[1]);
  EXPECT_EQ(metadata[0], metadata[1]);
  EXPECT_EQ(back[0], back[1]);
  EXPECT_EQ(masks[0], masks[1]);
  EXPECT_EQ(found[0][0], N * sparse24_metadata_bytes(K));
  EXPECT_EQ(found[0][0], found[1][0]);
  EXPECT_EQ(found[1][1], 0);
}

TEST(Sparse24, MaskOfTheNonzeros) {
  std::mt19937_64 rng(5);
  for (const DType dtype : kDTypes)
    for (const int64_t K : {1, 31, 32, 33, 100, 1028}) {
      const int64_t N = 3;
      const Mask mask = random_groups(N, (K + 3) / 4 * 4, 4, rng);
      Mask cut{N, K, std::vector<bool>(size_t(N * K))};
      Elements weight = random_elements(dtype, N * K, rng, true);
      for (int64_t i = 0; i < N * K; ++i) {
        cut.kept[size_t(i)] = mask.at(i / K, i % K);
        if (!cut.kept[size_t(i)]) weight.set(i, rng() % 2 ? weight.sign() : 0);
      }
      Guarded<uint32_t> bits(N * mask_words(K));
      ASSERT_TRUE(mask_nonzero({N, K, weight.bytes.data(), dtype, bits.data()}, &kPieces).ok());
      EXPECT_EQ(bits.values(), cut.bits());
      EXPECT_TRUE(bits.intact());
    }
}

}  // namespace
}  // namespace lors::test
