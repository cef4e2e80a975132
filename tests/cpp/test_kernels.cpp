// SPDX-License-Identifier: Apache-2.0
// Every table of CPU kernels that this processor runs, against float64 loops.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tables.h"

namespace lors::cpu {
namespace {

class Kernels : public testing::TestWithParam<const KernelTable*> {
 protected:
  void SetUp() override { LORS_SKIP_UNSUPPORTED(GetParam()); }
  const KernelTable& table() const { return *GetParam(); }

  std::vector<float> random(int64_t count, double zeros = 0.0) {
    std::normal_distribution<float> normal;
    std::bernoulli_distribution zero(zeros);
    std::vector<float> out(count);
    for (float& x : out) x = zero(rng_) ? (x = 0.0f, -0.0f) : normal(rng_);
    return out;
  }
  std::mt19937 rng_{1234};
};

double bfloat16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

double float16_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// The packed operands of a merge or of fused_linear.
struct Adapters {
  std::vector<float> panels, lora_B;
};
Adapters pack_adapters(const KernelTable& table, const std::vector<float>& lora_A, const std::vector<float>& lora_B, int64_t N,
                       int64_t K, int64_t r, int64_t panel, double scaling) {
  Adapters out;
  const int64_t panels = (K + panel - 1) / panel;
  out.panels.assign(panels * panel * r, NAN);
  out.lora_B.assign(N * r, NAN);
  for (int64_t q = 0; q < panels; ++q) {
    PackJob job;
    job.src = lora_A.data() + q * panel;
    job.columns = std::min(panel, K - q * panel);
    job.row_stride = K;
    job.column_stride = 1;
    job.width = panel;
    job.dst = out.panels.data() + q * panel * r;
    table.pack(job, 0, r);
  }
  PackJob job;
  job.src = lora_B.data();
  job.columns = job.width = job.row_stride = r;
  job.column_stride = 1;
  job.scale = scaling;
  job.dst = out.lora_B.data();
  table.pack(job, 0, N);
  return out;
}

double merged_value(const std::vector<float>& weight, const std::vector<float>& lora_A, const std::vector<float>& lora_B,
                    double s, int64_t n, int64_t k, int64_t K, int64_t r) {
  if (weight[n * K + k] == 0.0f) return 0.0;
  double sum = weight[n * K + k];
  for (int64_t p = 0; p < r; ++p) sum += s * lora_B[n * r + p] * lora_A[p * K + k];
  return sum;
}

struct Shape {
  int64_t T, N, K, r;
};
const Shape kShapes[] = {{1, 1, 1, 1},      {3, 7, 5, 2},      {17, 33, 70, 3},    {5, 64, 128, 16},  {129, 40, 33, 1},
                         {24, 193, 257, 5}, {7, 100, 385, 16}, {13, 390, 129, 17}, {97, 130, 400, 64}};

TEST_P(Kernels, Merge) {
  for (const auto& [T, N, K, r] : kShapes) {
    const auto weight = random(N * K, 0.5), lora_A = random(r * K), lora_B = random(N * r);
    const Adapters packed = pack_adapters(table(), lora_A, lora_B, N, K, r, table().merge_panel, 0.75);
    std::vector<float> merged(N * K + 1, NAN);
    MergeJob job;
    job.in_features = K;
    job.r = r;
    job.weight = weight.data();
    job.lora_A = packed.panels.data();
    job.lora_B = packed.lora_B.data();
    job.merged = merged.data();
    table().merge(job, 0, N);
    EXPECT_TRUE(std::isnan(merged[N * K])) << "wrote beyond the end";
    for (int64_t i = 0; i < N * K; ++i) {
      const double want = merged_value(weight, lora_A, lora_B, 0.75, i / K, i % K, K, r);
      if (weight[i] == 0.0f) {
        EXPECT_EQ(merged[i], 0.0f);
        EXPECT_FALSE(std::signbit(merged[i])) << "a masked value is exactly +0";
      }
      EXPECT_NEAR(merged[i], want, 1e-6 * (1 + std::sqrt(double(r)))) << N << "x" << K << " r=" << r << " at " << i;
    }
  }
}

// Large enough for non-temporal stores; one element further the rows are unaligned, and ordinary stores are used.
TEST_P(Kernels, MergeOfALargeResult) {
  const int64_t N = 9, K = 65616, r = 3;
  const auto weight = random(N * K, 0.5), lora_A = random(r * K), lora_B = random(N * r);
  const Adapters packed = pack_adapters(table(), lora_A, lora_B, N, K, r, table().merge_panel, 0.75);
  for (const int64_t shift : {0, 1}) {
    std::vector<float> memory(N * K + 17 + shift, NAN);
    float* const merged = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16 + shift;
    MergeJob job;
    job.in_features = K;
    job.r = r;
    job.weight = weight.data();
    job.lora_A = packed.panels.data();
    job.lora_B = packed.lora_B.data();
    job.merged = merged;
    table().merge(job, 0, N);
    EXPECT_TRUE(std::isnan(merged[N * K])) << "wrote beyond the end";
    for (int64_t i = 0; i < N * K; ++i)
      ASSERT_NEAR(merged[i], merged_value(weight, lora_A, lora_B, 0.75, i / K, i % K, K, r), 3e-6) << "at " << i;
  }
}

TEST_P(Kernels, FusedMatmul) {
  for (const bool input_gradient : {false, true})
    for (const auto& [T, N, K, r] : kShapes) {
      const int64_t columns = input_gradient ? K : N, depth = input_gradient ? N : K;
      const auto weight = random(N * K, 0.5), lora_A = random(r * K), lora_B = random(N * r);
      const auto activation = random(T * depth), bias = random(columns);
      const Adapters packed = pack_adapters(table(), lora_A, lora_B, N, K, r, table().fused_columns, 0.75);
      const int64_t panels = (T + table().fused_rows - 1) / table().fused_rows;
      std::vector<float> packed_activation(panels * table().fused_rows * depth, NAN), out(T * columns + 1, NAN);
      PackActivationJob pack;
      pack.tokens = T;
      pack.depth = depth;
      pack.src = activation.data();
      pack.dst = packed_activation.data();
      table().pack_activation(pack, 0, panels);
      FusedJob job;
      job.tokens = T;
      job.out_features = N;
      job.input_gradient = input_gradient;
      job.activation = packed_activation.data();
      job.weight.in_features = K;
      job.weight.r = r;
      job.weight.weight = weight.data();
      job.weight.lora_A = packed.panels.data();
      job.weight.lora_B = packed.lora_B.data();
      job.bias = bias.data();
      job.out = out.data();
      std::vector<float> scratch(table().fused_scratch, NAN);
      table().fused_matmul(job, 0, (columns + table().fused_columns - 1) / table().fused_columns, scratch.data(), nullptr);
      EXPECT_TRUE(std::isnan(out[T * columns])) << "wrote beyond the end";
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < columns; ++c) {
          double want = bias[c], size = 1;
          for (int64_t d = 0; d < depth; ++d) {
            const double term = activation[t * depth + d] * merged_value(weight, lora_A, lora_B, 0.75, input_gradient ? d : c,
                                                                         input_gradient ? c : d, K, r);
            want += term;
            size += term * term;
          }
          ASSERT_NEAR(out[t * columns + c], want, 1e-6 * std::sqrt(size * double(depth)))
              << "input_gradient=" << input_gradient << " T=" << T << " " << N << "x" << K << " r=" << r << " at " << t << ","
              << c;
        }
    }
}

TEST_P(Kernels, Contract) {
  for (const auto& [I, J, unused, r] : kShapes) {
    const int64_t width = (r + kThinWidth - 1) / kThinWidth * kThinWidth;
    const auto matrix = random(I * J), kept = random(I * J, 0.5);
    for (const bool masked : {false, true})
      for (const bool rows : {true, false}) {
        const auto factor = random((rows ? J : I) * width);
        std::vector<float> out((rows ? I : J) * width, NAN);
        ContractJob job;
        job.rows = I;
        job.columns = J;
        job.matrix = matrix.data();
        job.kept_where = masked ? kept.data() : nullptr;
        job.kept_where_size = 4;
        job.factor = factor.data();
        job.out = out.data();
        job.width = width;
        rows ? table().contract_rows(job, 0, I) : table().contract_columns(job, 0, J);
        for (int64_t a = 0; a < (rows ? I : J); ++a)
          for (int64_t p = 0; p < width; ++p) {
            double want = 0, size = 1;
            for (int64_t b = 0; b < (rows ? J : I); ++b) {
              const int64_t at = rows ? a * J + b : b * J + a;
              const double term = masked && kept[at] == 0.0f ? 0.0 : double(matrix[at]) * factor[b * width + p];
              want += term;
              size += term * term;
            }
            ASSERT_NEAR(out[a * width + p], want, 1e-6 * std::sqrt(size * double(rows ? J : I)))
                << "rows=" << rows << " masked=" << masked << " " << I << "x" << J << " at " << a << "," << p;
          }
      }
  }
}

std::vector<uint16_t> bfloat16s(const std::vector<float>& values) {
  std::vector<uint16_t> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    out[i] = uint16_t(bits >> 16);
  }
  return out;
}

TEST_P(Kernels, PairsAreExactWithinTheirRange) {
  if (!table().pairs_are_exact) GTEST_SKIP() << "this table does not multiply pairs";
  std::vector<uint16_t> many(1000, 0x3f80);
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const uint16_t element = uint16_t(bits);
    const double size = std::abs(bfloat16_value(element));
    const bool want = size == 0 || (size >= 0x1p-56 && size <= 0x1p56);
    ASSERT_EQ(table().pairs_are_exact(&element, 1), want) << bits;
    many[bits % many.size()] = element;
    ASSERT_EQ(table().pairs_are_exact(many.data(), int64_t(many.size())), want) << bits;
    many[bits % many.size()] = 0x3f80;
  }
}

// The products by which gradients are formed, from bfloat16 pairs where the table has them: the smallest numbers that are
// allowed, sums that cancel, and a rank of one pair up.
TEST_P(Kernels, Pairs) {
  if (!table().pairs_are_exact) GTEST_SKIP() << "this table does not multiply pairs";
  for (const auto& [unused, N, K, ranks] : kShapes) {
    const int64_t r = 2 * ranks, width = (N + kThinWidth - 1) / kThinWidth * kThinWidth, panel = table().merge_panel;
    const int64_t panels = (K + panel - 1) / panel;
    auto values_A = random(r * K), values_B = random(N * r);
    for (float& x : values_A) x *= x > 1.5f ? 0x1p-54f : 1.0f;
    for (float& x : values_B) x *= x < -1.5f ? 0x1p-54f : 1.0f;
    auto A = bfloat16s(values_A), B = bfloat16s(values_B);
    for (auto* matrix : {&A, &B})
      for (uint16_t& x : *matrix)
        if (!table().pairs_are_exact(&x, 1)) x = 0;
    // out[n, k] by the merge's kernel, out_T[k, n] by contract_rows.
    std::vector<float> packed_A(panels * ranks * panel, NAN), packed_B(N * ranks, NAN), out(N * K + 1, NAN);
    PackJob pack;
    pack.row_stride = 2 * K;
    pack.column_stride = 1;
    pack.pair_stride = K;
    pack.width = panel;
    for (int64_t q = 0; q < panels; ++q) {
      pack.src = A.data() + q * panel;
      pack.columns = std::min(panel, K - q * panel);
      pack.dst = packed_A.data() + q * ranks * panel;
      table().pack(pack, 0, ranks);
    }
    pack.src = B.data();
    pack.columns = pack.width = ranks;
    pack.row_stride = r;
    pack.column_stride = 2;
    pack.pair_stride = 1;
    pack.dst = packed_B.data();
    table().pack(pack, 0, N);
    MergeJob job;
    job.in_features = K;
    job.r = ranks;
    job.pairs = true;
    job.lora_A = packed_A.data();
    job.lora_B = packed_B.data();
    job.scaling = -1.5f;
    job.merged = out.data();
    table().multiply(job, 0, N);
    EXPECT_TRUE(std::isnan(out[N * K])) << "wrote beyond the end";

    std::vector<uint16_t> A_T(K * r);
    for (int64_t p = 0; p < r; ++p)
      for (int64_t k = 0; k < K; ++k) A_T[k * r + p] = A[p * K + k];
    std::vector<float> factor(ranks * width, NAN), out_T(K * width, NAN);
    pack.src = B.data();
    pack.columns = N;
    pack.row_stride = 2;
    pack.column_stride = r;
    pack.pair_stride = 1;
    pack.width = width;
    pack.dst = factor.data();
    table().pack(pack, 0, ranks);
    ContractJob contract;
    contract.rows = K;
    contract.columns = ranks;
    contract.matrix = A_T.data();
    contract.factor = factor.data();
    contract.out = out_T.data();
    contract.width = width;
    contract.pairs = true;
    table().contract_rows(contract, 0, K);

    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        double want = 0, size = 0;
        for (int64_t p = 0; p < r; ++p) {
          const double term = bfloat16_value(B[n * r + p]) * bfloat16_value(A[p * K + k]);
          want += term;
          size += term * term;
        }
        const double bound = 0x1p-22 * std::sqrt(size * double(r));
        ASSERT_NEAR(out[n * K + k], -1.5 * want, 1.5 * bound) << N << "x" << K << " r=" << r << " at " << n << "," << k;
        ASSERT_NEAR(out_T[k * width + n], want, bound) << N << "x" << K << " r=" << r << " at " << n << "," << k;
      }
  }
}

// Every 16-bit number in, through the merge with a zero adapter, and out again unchanged; and every rounding, both ways.
TEST_P(Kernels, SixteenBitConversions) {
  const int64_t K = 65536;
  std::vector<uint16_t> all(K);
  for (int64_t i = 0; i < K; ++i) all[i] = uint16_t(i);
  const std::vector<float> zero(K + table().merge_panel, 0.0f);
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    const auto value = [&](uint16_t bits) { return dtype == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits); };
    std::vector<float> wide(K, NAN);
    std::vector<uint16_t> back(K, 1);
    MergeJob job;
    job.in_features = K;
    job.r = 1;
    job.lora_A = zero.data();
    job.lora_B = zero.data();
    job.weight = all.data();
    job.weight_dtype = dtype;
    job.merged = wide.data();
    table().merge(job, 0, 1);
    job.merged = back.data();
    job.merged_dtype = job.round_to = dtype;
    table().merge(job, 0, 1);
    for (int64_t i = 0; i < K; ++i) {
      if (std::isnan(value(all[i]))) {
        EXPECT_TRUE(std::isnan(wide[i])) << i;
        EXPECT_TRUE(std::isnan(value(back[i]))) << i;
      } else {
        EXPECT_EQ(wide[i], value(all[i])) << i;
        EXPECT_EQ(value(back[i]), value(all[i])) << i;
      }
    }
    // Between two neighbours: below, at and above the midpoint. Ties go to the even one.
    for (uint16_t bits = 0; std::isfinite(value(bits + 1)); ++bits) {
      const double low = value(bits), high = value(bits + 1), middle = (low + high) / 2;
      const float mid = float(middle);
      const std::vector<float> given = {std::nextafter(mid, 0.0f), mid, std::nextafter(mid, HUGE_VALF), -mid};
      const std::vector<double> want = {low, bits % 2 ? high : low, high, -(bits % 2 ? high : low)};
      std::vector<float> line(table().merge_panel, 1.0f), in_place(table().merge_panel);
      std::vector<uint16_t> rounded(table().merge_panel);
      std::copy(given.begin(), given.end(), line.begin());
      if (double(mid) != middle) continue;  // the midpoint of float16's smallest pair is exact; float32 always holds it
      job.in_features = table().merge_panel;
      job.weight = line.data();
      job.weight_dtype = DType::float32;
      job.merged = rounded.data();
      job.merged_dtype = job.round_to = dtype;
      table().merge(job, 0, 1);
      job.merged = in_place.data();
      job.merged_dtype = DType::float32;
      table().merge(job, 0, 1);
      for (size_t i = 0; i < given.size(); ++i) {
        ASSERT_EQ(value(rounded[i]), want[i]) << "bits " << bits << " case " << i;
        ASSERT_EQ(double(in_place[i]), want[i]) << "bits " << bits << " case " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, Kernels, testing::ValuesIn(kTables), table_name);

}  // namespace
}  // namespace lors::cpu
