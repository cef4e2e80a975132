// SPDX-License-Identifier: Apache-2.0
// The merge from and into the compressed layouts, and fused_linear from them, bit for bit against the dense weight with the
// same mask, by every table of kernels. What the dense merge computes is test_kernels.cpp's business.
#include <lors/random.h>
#include <lors/sparse24.h>

#include <cmath>
#include <limits>

#include "layouts.h"
#include "tables.h"
#include "with_table.h"

namespace lors::test {
namespace {

struct Problem {
  int64_t N, K, r;
  DType dtype, merged_dtype, round_to;
  DType adapters = DType::float32;  // or bfloat16, which some tables multiply in pairs
};

// One weight in every layout, and its adapters.
struct Operands {
  Operands(const Problem& p, const Mask& mask, std::mt19937_64& rng)
      : mask(mask),
        bits(mask.bits()),
        dense(p.dtype, p.N * p.K),
        slots(p.dtype, p.N * p.K / 2),
        packed(p.dtype, 0),
        lora_A(p.adapters, p.r * p.K),
        lora_B(p.adapters, p.N * p.r) {
    Elements weight = random_elements(p.dtype, p.N * p.K, rng, true);
    for (int64_t i = 0; i < p.N * p.K; ++i)
      if (rng() % 7 == 0) weight.set(i, rng() % 2 ? weight.sign() : 0);
    row_offsets = offsets_of(mask);
    packed = kept_values(weight, mask);
    if (p.K % 4 == 0) {
      Encoded encoded = encode(weight, mask);
      slots = encoded.values;
      metadata = encoded.metadata;
    }
    for (int64_t i = 0; i < p.N * p.K; ++i) dense.set(i, mask.kept[size_t(i)] ? weight.stored(i) : 0);
    // In some places sums so small that a 16-bit type rounds them to zeros of either sign. Pairs are not as small.
    std::normal_distribution<float> normal;
    const bool pairs = p.adapters == DType::bfloat16;
    const float small_A = pairs ? 0x1p-50f : 0x1p-65f, small_B = pairs ? 0x1p-45f : 0x1p-70f;
    const auto fill = [&](Elements& out, int64_t i, float x) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      out.set(i, pairs ? bits >> 16 : bits);
    };
    for (int64_t i = 0; i < p.r * p.K; ++i) fill(lora_A, i, normal(rng) * (i % p.K % 5 ? 1.0f : small_A));
    for (int64_t i = 0; i < p.N * p.r; ++i) fill(lora_B, i, normal(rng) * (i / p.r % 2 ? 1.0f : small_B));
  }

  MergeArgs merge_args(const Problem& p, Layout layout, void* merged) const {
    MergeArgs out;
    out.out_features = p.N;
    out.in_features = p.K;
    out.r = p.r;
    out.lora_A = p.r ? lora_A.bytes.data() : nullptr;
    out.lora_B = p.r ? lora_B.bytes.data() : nullptr;
    out.lora_A_dtype = out.lora_B_dtype = p.adapters;
    out.scaling = 0.75;
    out.weight_layout = layout;
    out.weight_dtype = p.dtype;
    out.merged_dtype = p.merged_dtype;
    out.round_to = p.round_to;
    out.merged = merged;
    out.weight = layout == Layout::dense      ? dense.bytes.data()
                 : layout == Layout::sparse24 ? slots.bytes.data()
                                              : packed.bytes.data();
    if (layout != Layout::sparse24) out.mask = bits.data();
    if (layout == Layout::sparse24) out.metadata = metadata.data();
    if (layout == Layout::bitmap) out.row_offsets = row_offsets.data();
    return out;
  }

  Mask mask;
  std::vector<uint32_t> bits;
  Elements dense, slots, packed;
  std::vector<uint8_t> metadata;
  std::vector<int64_t> row_offsets;
  Elements lora_A, lora_B;
};

std::vector<unsigned char> signless_zeros(DType dtype, std::vector<unsigned char> bytes) {
  Elements values(dtype, 0);
  values.bytes = std::move(bytes);
  for (int64_t i = 0; i < values.size(); ++i) values.set(i, values.stored(i));
  return values.bytes;
}

class MergeLayouts : public testing::TestWithParam<const cpu::KernelTable*> {
 protected:
  void SetUp() override {
    using cpu::unsupported;
    LORS_SKIP_UNSUPPORTED(GetParam());
  }

  void expect_same(const Problem& p, const Operands& o, Layout layout, const CpuHost* host, int64_t shift) {
    const int64_t size = dtype_size(p.merged_dtype);
    GuardedBytes want(p.N * p.K * size), got(p.N * p.K * size, shift * size);
    ASSERT_TRUE(merge_with(*GetParam(), o.merge_args(p, Layout::dense, want.data()), host).ok());
    ASSERT_TRUE(merge_with(*GetParam(), o.merge_args(p, layout, got.data()), host).ok());
    EXPECT_EQ(want.values(), got.values());
    EXPECT_TRUE(want.intact() && got.intact());
  }

  void expect_same_slots(const Problem& p, const Operands& o, const CpuHost* host) {
    std::vector<unsigned char> dense(size_t(p.N * p.K * dtype_size(p.dtype))), want(o.slots.bytes.size());
    ASSERT_TRUE(merge_with(*GetParam(), o.merge_args(p, Layout::dense, dense.data()), host).ok());
    Elements merged(p.dtype, p.N * p.K);
    merged.bytes = dense;
    want = encode(merged, o.mask).values.bytes;
    GuardedBytes apart(int64_t(want.size())), in_place(int64_t(want.size()));
    MergeArgs args = o.merge_args(p, Layout::sparse24, apart.data());
    args.merged_layout = Layout::sparse24;
    ASSERT_TRUE(merge_with(*GetParam(), args, host).ok());
    EXPECT_EQ(apart.values(), want);
    std::copy(o.slots.bytes.begin(), o.slots.bytes.end(), in_place.data());
    args.weight = args.merged = in_place.data();
    ASSERT_TRUE(merge_with(*GetParam(), args, host).ok());
    EXPECT_EQ(in_place.values(), want);
    EXPECT_TRUE(apart.intact() && in_place.intact());
  }

  void expect_same_kept(const Problem& p, const Operands& o, const CpuHost* host) {
    Elements merged(p.dtype, p.N * p.K);
    ASSERT_TRUE(merge_with(*GetParam(), o.merge_args(p, Layout::dense, merged.bytes.data()), host).ok());
    const std::vector<unsigned char> want = kept_values(merged, o.mask).bytes;
    GuardedBytes apart(int64_t(want.size())), in_place(int64_t(want.size()));
    MergeArgs args = o.merge_args(p, Layout::bitmap, apart.data());
    args.merged_layout = Layout::bitmap;
    ASSERT_TRUE(merge_with(*GetParam(), args, host).ok());
    EXPECT_EQ(apart.values(), want);
    std::copy(o.packed.bytes.begin(), o.packed.bytes.end(), in_place.data());
    args.weight = args.merged = in_place.data();
    ASSERT_TRUE(merge_with(*GetParam(), args, host).ok());
    EXPECT_EQ(in_place.values(), want);
    EXPECT_TRUE(apart.intact() && in_place.intact());
  }
};

std::vector<Problem> problems(int64_t N, int64_t K, int64_t r) {
  std::vector<Problem> out = {{N, K, r, DType::float64, DType::float64, DType::float64}};
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType round_to : {DType::float32, DType::bfloat16, DType::float16}) {
      out.push_back({N, K, r, dtype, DType::float32, round_to});
      if (round_to != DType::float32) out.push_back({N, K, r, dtype, round_to, round_to});
      if (round_to != DType::float16) out.push_back({N, K, r, dtype, round_to, round_to, DType::bfloat16});
    }
  return out;
}

TEST_P(MergeLayouts, EveryShapeAndType) {
  std::mt19937_64 rng(1);
  for (const int64_t r : {1, 3, 16, 64})
    for (const int64_t N : {1, 3, 7, 13})
      for (const int64_t K : {4, 8, 12, 36, 60, 68, 128, 132, 196, 1028})
        for (const Problem& p : problems(N, K, r)) {
          SCOPED_TRACE(testing::Message() << N << "x" << K << " r=" << r << " " << int(p.dtype) << " to " << int(p.merged_dtype)
                                          << " rounded to " << int(p.round_to));
          const Operands groups(p, random_groups(N, K, 2, rng), rng),
              any(p, random_mask(N, K, unsigned(rng() % 101), rng), rng);
          expect_same(p, groups, Layout::sparse24, nullptr, 0);
          expect_same(p, groups, Layout::bitmap, nullptr, 1);
          expect_same(p, any, Layout::bitmap, nullptr, 0);
          if (p.merged_dtype == p.dtype && p.round_to == p.dtype) {
            expect_same_slots(p, groups, nullptr);
            expect_same_kept(p, any, nullptr);
          }
          if (HasFailure()) return;
        }
}

TEST_P(MergeLayouts, ColumnsThatNoGroupDivides) {
  std::mt19937_64 rng(2);
  for (const int64_t K : {1, 3, 31, 33, 65, 127, 1027})
    for (const Problem& p : problems(9, K, 5)) {
      SCOPED_TRACE(testing::Message() << "K=" << K << " " << int(p.dtype) << " to " << int(p.merged_dtype));
      expect_same(p, Operands(p, random_mask(9, K, unsigned(rng() % 101), rng), rng), Layout::bitmap, nullptr, 0);
      if (HasFailure()) return;
    }
}

// Few tokens and more, whole and partial panels, one piece and several.
TEST_P(MergeLayouts, FusedLinear) {
  std::mt19937_64 rng(5);
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{1, 4}, {7, 36}, {70, 264}, {33, 1028}, {5, 101}})
    for (const int64_t r : {0, 3, 4})
      for (const Problem& p : problems(N, K, r)) {
        if (p.dtype == DType::float64 || (p.merged_dtype != DType::float32 && p.adapters != DType::bfloat16)) continue;
        const Operands groups(p, K % 4 ? random_mask(N, K, 50, rng) : random_groups(N, K, 2, rng), rng),
            any(p, random_mask(N, K, 50, rng), rng);
        for (const int64_t T : {1, 8, 9, 30, 600}) {
          if (T == 600 && (K != 264 || r == 0)) continue;  // enough work for several pieces
          for (const bool gradient : {false, true}) {
            SCOPED_TRACE(testing::Message() << N << "x" << K << " r=" << r << " T=" << T << " gradient=" << gradient << " "
                                            << int(p.dtype) << " rounded to " << int(p.round_to));
            std::vector<float> activation(size_t(T * (gradient ? N : K)));
            for (float& x : activation) x = float(int(rng() % 17) - 8);
            const auto output = [&](const Operands& o, Layout layout, const CpuHost* host) {
              const MergeArgs merge = o.merge_args(p, layout, nullptr);
              Guarded<float> out(T * (gradient ? K : N));
              FusedLinearArgs args;
              args.tokens = T;
              args.out_features = N;
              args.in_features = K;
              args.r = r;
              args.input_gradient = gradient;
              args.activation = activation.data();
              args.weight_layout = layout;
              args.weight = merge.weight;
              args.weight_dtype = p.dtype;
              args.mask = merge.mask;
              args.metadata = merge.metadata;
              args.row_offsets = merge.row_offsets;
              args.lora_A = merge.lora_A;
              args.lora_B = merge.lora_B;
              args.lora_A_dtype = args.lora_B_dtype = p.adapters;
              args.scaling = merge.scaling;
              args.round_to = p.round_to;
              args.output = out.data();
              EXPECT_TRUE(fused_linear_with(*GetParam(), args, host).ok());
              EXPECT_TRUE(out.intact());
              std::vector<uint32_t> bits(size_t(T * (gradient ? K : N)));
              std::memcpy(bits.data(), out.data(), bits.size() * 4);
              for (uint32_t& b : bits)  // of two NaNs that are added either may be the sum: their signs say nothing
                if ((b & 0x7fffffff) > 0x7f800000) b &= 0x7fffffff;
              return bits;
            };
            EXPECT_EQ(output(any, Layout::dense, nullptr), output(any, Layout::bitmap, nullptr));
            EXPECT_EQ(output(any, Layout::dense, &kPieces), output(any, Layout::bitmap, &kPieces));
            if (K % 4 == 0) {
              EXPECT_EQ(output(groups, Layout::dense, nullptr), output(groups, Layout::sparse24, nullptr));
              EXPECT_EQ(output(groups, Layout::dense, &kPieces), output(groups, Layout::sparse24, &kPieces));
            }
            if (HasFailure()) return;
          }
        }
      }
}

// Several pieces, several groups of panels, and results large enough to leave past the caches.
TEST_P(MergeLayouts, LargeAndOnThreads) {
  std::mt19937_64 rng(3);
  for (const Problem& p : {Problem{19, 65632, 3, DType::float32, DType::float32, DType::float32},
                           Problem{75, 4140, 40, DType::bfloat16, DType::bfloat16, DType::bfloat16},
                           Problem{75, 4160, 40, DType::bfloat16, DType::bfloat16, DType::bfloat16, DType::bfloat16},
                           Problem{75, 4160, 40, DType::float64, DType::float64, DType::float64},
                           Problem{75, 4160, 40, DType::bfloat16, DType::float32, DType::bfloat16}}) {
    const Operands groups(p, random_groups(p.N, p.K, 2, rng), rng),
        any(p, random_mask(p.N, p.K, unsigned(rng() % 101), rng), rng);
    for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces})
      for (const int64_t shift : {0, 1}) {
        expect_same(p, groups, Layout::sparse24, host, shift);
        expect_same(p, groups, Layout::bitmap, host, shift);
        expect_same(p, any, Layout::bitmap, host, shift);
      }
    if (p.merged_dtype == p.dtype) {
      expect_same_slots(p, groups, nullptr);
      expect_same_slots(p, groups, &kPieces);
      expect_same_kept(p, any, nullptr);
      expect_same_kept(p, any, &kPieces);
    }
  }
}

// Without an adapter the merge decompresses: what is kept as it is but for -0.0, +0 elsewhere.
TEST_P(MergeLayouts, NoAdapterDecompresses) {
  std::mt19937_64 rng(4);
  for (const DType dtype : kDTypes)
    for (const int64_t K : {4, 68, 1028}) {
      SCOPED_TRACE(testing::Message() << "K=" << K << " " << int(dtype));
      const Problem p{9, K, 0, dtype, dtype, dtype};
      const Operands groups(p, random_groups(9, K, 2, rng), rng), any(p, random_mask(9, K, 50, rng), rng);
      for (const Operands* o : {&groups, &any})
        for (const Layout layout : {Layout::dense, Layout::sparse24, Layout::bitmap}) {
          if (o == &any && layout == Layout::sparse24) continue;
          GuardedBytes merged(9 * K * dtype_size(dtype));
          MergeArgs args = o->merge_args(p, layout, merged.data());
          args.scaling = -std::numeric_limits<double>::infinity();
          ASSERT_TRUE(merge_with(*GetParam(), args, nullptr).ok());
          EXPECT_EQ(merged.values(), o->dense.bytes);
          EXPECT_TRUE(merged.intact());
        }
      expect_same_slots(p, groups, &kPieces);
      Elements zeros(dtype, 9 * K);
      for (int64_t i = 0; i < 9 * K; ++i) zeros.set(i, zeros.sign());
      MergeArgs args = any.merge_args(p, Layout::dense, zeros.bytes.data());
      args.weight = zeros.bytes.data();
      ASSERT_TRUE(merge_with(*GetParam(), args, nullptr).ok());
      EXPECT_EQ(zeros.bytes, Elements(dtype, 9 * K).bytes);
    }
}

// The float32 merge, drawn by the scalar formulas of random.h: what every table, layout and division of the work must give.
std::vector<float> drawn(const Problem& p, const Operands& o, const Draws& draws, std::vector<float> merged) {
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t k = 0; k < p.K; ++k) {
      float& x = merged[size_t(n * p.K + k)];
      if (draws.noise && o.mask.kept[size_t(n * p.K + k)]) {
        float factor = draws.noise[n] * kNormalUnit;
        uint32_t bits;
        std::memcpy(&bits, &factor, 4);
        bits = short_factor(bits);
        std::memcpy(&factor, &bits, 4);
        x += factor * float(int32_t(random_normal(random_row(draws.noise_seed, n), uint32_t(k))));
      }
      if (draws.rounds && p.round_to != DType::float32) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits =
            round_by_chance(bits, random_word(random_row(draws.rounding_seed, n), uint32_t(k)), p.round_to == DType::float16);
        std::memcpy(&x, &bits, 4);
      }
    }
  return merged;
}

TEST_P(MergeLayouts, Draws) {
  std::mt19937_64 rng(6);
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{1, 4}, {7, 36}, {51, 264}, {26, 1028}, {5, 101}})
    for (const Problem& p : problems(N, K, 3)) {
      if (p.dtype == DType::float64) continue;
      SCOPED_TRACE(testing::Message() << N << "x" << K << " " << int(p.dtype) << " to " << int(p.merged_dtype) << " rounded to "
                                      << int(p.round_to));
      const Operands o(p, K % 4 ? random_mask(N, K, 50, rng) : random_groups(N, K, 2, rng), rng);
      std::vector<float> deviation(static_cast<size_t>(N));
      for (float& x : deviation) x = float(rng() % 100) / 1000;
      std::vector<float> unrounded(size_t(N * K));
      MergeArgs args = o.merge_args(p, Layout::dense, unrounded.data());
      args.merged_dtype = args.round_to = DType::float32;
      ASSERT_TRUE(merge_with(*GetParam(), args, nullptr).ok());
      for (const bool rounds : {false, true})
        for (const float* noise : {static_cast<const float*>(nullptr), static_cast<const float*>(deviation.data())}) {
          const Draws draws{rounds, rng(), noise, rng()};
          std::vector<float> values = drawn(p, o, draws, unrounded);
          // To nearest, which leaves what was drawn: all kept, without an adapter.
          const std::vector<uint32_t> all(size_t(N * mask_words(K)), ~0u);
          GuardedBytes want(N * K * dtype_size(p.merged_dtype));
          MergeArgs plain;
          plain.out_features = N;
          plain.in_features = K;
          plain.weight = values.data();
          plain.mask = all.data();
          plain.merged = want.data();
          plain.merged_dtype = p.merged_dtype;
          plain.round_to = p.round_to;
          ASSERT_TRUE(merge_with(*GetParam(), plain, nullptr).ok());
          for (const Layout layout : {Layout::dense, Layout::sparse24, Layout::bitmap})
            for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces}) {
              if (layout == Layout::sparse24 && K % 4) continue;
              GuardedBytes got(N * K * dtype_size(p.merged_dtype), layout == Layout::bitmap ? dtype_size(p.merged_dtype) : 0);
              MergeArgs drawing = o.merge_args(p, layout, got.data());
              drawing.draws = draws;
              ASSERT_TRUE(merge_with(*GetParam(), drawing, host).ok());
              EXPECT_TRUE(got.intact());
              EXPECT_EQ(signless_zeros(p.merged_dtype, got.values()), signless_zeros(p.merged_dtype, want.values()));
            }
        }
      if (HasFailure()) return;
    }
}

TEST_P(MergeLayouts, DrawsForADenseResultOnly) {
  std::mt19937_64 rng(7);
  const Problem p{4, 8, 1, DType::bfloat16, DType::bfloat16, DType::bfloat16};
  const Operands o(p, random_groups(4, 8, 2, rng), rng);
  Elements values = o.slots;
  MergeArgs args = o.merge_args(p, Layout::sparse24, values.bytes.data());
  args.merged_layout = Layout::sparse24;
  args.draws.rounds = true;
  EXPECT_NE(merge_with(*GetParam(), args, nullptr).message().find("for a dense result only"), std::string::npos);
}

// Slots never hold -0.0, also where the dense merge rounds to it.
TEST_P(MergeLayouts, ZerosInSlotsHaveNoSign) {
  const float lora_A[4] = {1, 1, 1, 1}, lora_B = -0x1p-30f;
  const uint16_t values[2] = {0, 0};
  const uint8_t metadata = 0 | 1 << 2;
  uint16_t merged[2] = {7, 7};
  MergeArgs args;
  args.out_features = args.r = 1;
  args.in_features = 4;
  args.weight_layout = args.merged_layout = Layout::sparse24;
  args.weight = values;
  args.weight_dtype = args.merged_dtype = args.round_to = DType::float16;
  args.metadata = &metadata;
  args.lora_A = lora_A;
  args.lora_B = &lora_B;
  args.merged = merged;
  ASSERT_TRUE(merge_with(*GetParam(), args, nullptr).ok());
  EXPECT_EQ(merged[0], 0);
  EXPECT_EQ(merged[1], 0);
}

INSTANTIATE_TEST_SUITE_P(Tables, MergeLayouts, testing::ValuesIn(cpu::kTables), cpu::table_name);

}  // namespace
}  // namespace lors::test
