// SPDX-License-Identifier: Apache-2.0
// The kept weights of a dense one, and the mask of 2:4 metadata, against loops.
#include <lors/compress.h>
#include <lors/sparse24.h>

#include "layouts.h"

namespace lors::test {
namespace {

TEST(Compress, KeptWeights) {
  std::mt19937_64 rng(1);
  for (const DType dtype : kDTypes)
    for (const auto& [N, K] : {std::pair<int64_t, int64_t>{0, 8}, {1, 1}, {3, 31}, {7, 68}, {3, 1028}, {203, 2052}})
      for (const unsigned percent : {0, 10, 50, 100}) {
        SCOPED_TRACE(testing::Message() << "dtype " << int(dtype) << ", " << N << "x" << K << ", " << percent << " %");
        const Mask mask = random_mask(N, K, percent, rng);
        const std::vector<uint32_t> bits = mask.bits();
        const std::vector<int64_t> offsets = offsets_of(mask);
        Elements weight = random_elements(dtype, N * K, rng, true);
        for (int64_t i = 0; i < N * K; ++i)
          if (rng() % 5 == 0) weight.set(i, rng() % 2 ? weight.sign() : 0);
        const Elements want = kept_values(weight, mask);
        for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces}) {
          GuardedBytes values(int64_t(want.bytes.size()));
          const void* dense = weight.bytes.data();
          ASSERT_TRUE(compress({N, K, dense, dtype, bits.data(), offsets.data(), values.data()}, host).ok());
          EXPECT_EQ(values.values(), want.bytes);
          EXPECT_TRUE(values.intact());
        }
      }
}

TEST(Compress, MaskOfMetadata) {
  std::mt19937_64 rng(2);
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{0, 8}, {1, 4}, {3, 36}, {7, 60}, {3, 1028}, {203, 2052}}) {
    SCOPED_TRACE(testing::Message() << N << "x" << K);
    const Mask mask = random_groups(N, K, 2, rng);
    const std::vector<uint8_t> metadata = encode(random_elements(DType::float32, N * K, rng, false), mask).metadata;
    for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces}) {
      Guarded<uint32_t> bits(N * mask_words(K));
      ASSERT_TRUE(sparse24_mask({N, K, metadata.data(), bits.data()}, host).ok());
      EXPECT_EQ(bits.values(), mask.bits());
      EXPECT_TRUE(bits.intact());
    }
  }
}

}  // namespace
}  // namespace lors::test
