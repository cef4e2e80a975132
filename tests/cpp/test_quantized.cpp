// SPDX-License-Identifier: Apache-2.0
// Quantised weights on the CPU by every table of kernels: what is merged from codes and what is multiplied with them, bit for
// bit what the same of a float32 weight of the dequantised values is; requantised values bit for bit by scalar formulas.
#include <lors/quantization.h>
#include <lors/random.h>
#include <lors/sparse24.h>

#include <cmath>
#include <limits>

#include "layouts.h"
#include "tables.h"
#include "with_table.h"

namespace lors::test {
namespace {

constexpr Grid kGrids[] = {Grid::int8, Grid::int4, Grid::e4m3};
constexpr Layout kLayouts[] = {Layout::dense, Layout::sparse24, Layout::bitmap};

// The number that the bits of a code stand for.
float number_of(Grid grid, uint8_t code) {
  if (grid == Grid::int8) return float(int8_t(code));
  if (grid == Grid::int4) return float(code & 8 ? int(code & 15) - 16 : int(code & 15));
  const int exponent = code >> 3 & 15, fraction = code & 7;
  float number = exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
  if ((code & 0x7f) == 0x7f) number = std::numeric_limits<float>::quiet_NaN();
  return code & 0x80 ? -number : number;
}

// The nearest number of e4m3, the even one of two.
float nearest_e4m3(float x) {
  float best = 0.0f;
  uint8_t best_code = 0;
  for (int code = 0; code < 0x7f; ++code) {
    const float number = number_of(Grid::e4m3, uint8_t(code));
    const double off = std::fabs(double(std::fabs(x)) - number), least = std::fabs(double(std::fabs(x)) - best);
    if (off < least || (off == least && best_code & 1)) best = number, best_code = uint8_t(code);
  }
  return best == 0 ? 0.0f : std::copysign(best, x);
}

struct Problem {
  Grid grid;
  int64_t N, K, r, group;
  DType scales_dtype;
  bool zero_points;
};

// Of a type with as many bits, exactly.
uint64_t as_bits(DType dtype, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::float32) return bits;
  if (dtype == DType::bfloat16) return bits >> 16;
  return (bits >> 16 & 0x8000) | (bits & 0x7fffffff ? ((bits >> 13 & 0x3ffff) - (112 << 10)) & 0x7fff : 0);
}

// A weight's codes in every layout, the float32 weight they stand for, and adapters.
struct Operands {
  Operands(const Problem& p, std::mt19937_64& rng)
      : mask(p.K % 4 ? random_mask(p.N, p.K, 50, rng) : random_groups(p.N, p.K, 2, rng)),
        bits(mask.bits()),
        scales(p.scales_dtype, p.N * p.K / p.group),
        weight(DType::float32, p.N * p.K),
        lora_A(size_t(p.r * p.K)),
        lora_B(size_t(p.N * p.r)) {
    const bool is_int4 = p.grid == Grid::int4;
    for (int64_t g = 0; g < scales.size(); ++g) {
      // Of eight bits, so that each type holds them, and of all powers of 2 that float16 has.
      step.push_back(std::ldexp(float(128 + rng() % 128), -int(rng() % 12) - 9));
      if (p.scales_dtype == DType::float32) step.back() *= 1.00001f;
      scales.set(g, as_bits(p.scales_dtype, step.back()));
      zeros.push_back(!p.zero_points ? 0 : is_int4 ? int8_t(int(rng() % 16) - 8) : int8_t(16 * (int(rng() % 16) - 8)));
    }
    Elements codes(DType::bfloat16, p.N * p.K);  // a code and a bit that tells it from no code
    for (int64_t i = 0; i < codes.size(); ++i) {
      uint8_t code = uint8_t(rng() & (is_int4 ? 15 : 255));
      if (p.grid == Grid::e4m3 && (code & 0x7f) == 0x7f) code = 0x7e;
      codes.set(i, 256 | code);
      const size_t g = size_t(i / p.K * (p.K / p.group) + i % p.K / p.group);
      const float w = (number_of(p.grid, code) - float(zeros[g])) * step[g];
      weight.set(i, as_bits(DType::float32, mask.kept[size_t(i)] ? w + 0.0f : 0.0f));
    }
    packed[0] = bytes_of(codes, is_int4, {});
    if (p.K % 4 == 0) {
      const Encoded encoded = encode(codes, mask);
      packed[1] = bytes_of(encoded.values, is_int4, {});
      metadata = encoded.metadata;
    }
    row_offsets = offsets_of(mask);
    packed[2] = bytes_of(kept_values(codes, mask), is_int4, row_offsets);
    if (is_int4)
      for (size_t n = 1, beyond = 0; n < row_offsets.size(); ++n) {
        beyond += size_t(row_offsets[n] + int64_t(beyond) - row_offsets[n - 1]) % 2;
        row_offsets[n] += int64_t(beyond);
      }
    std::normal_distribution<float> normal;
    for (float& x : lora_A) x = normal(rng);
    for (float& x : lora_B) x = normal(rng) / 8;
  }

  // One code in each byte, or two; `rows`: where rows begin among them, which they do with a byte of their own.
  static std::vector<uint8_t> bytes_of(const Elements& codes, bool is_int4, const std::vector<int64_t>& rows) {
    std::vector<uint8_t> out;
    size_t row = 1, in_row = 0;
    for (int64_t i = 0; i < codes.size(); ++i, ++in_row) {
      for (; row < rows.size() && i == rows[row]; ++row) in_row = 0;
      if (is_int4 && in_row % 2)
        out.back() = uint8_t(out.back() | codes.get(i) << 4);
      else
        out.push_back(uint8_t(codes.get(i) & (is_int4 ? 15 : 255)));
    }
    return out;
  }

  template <typename Args>
  Args args(const Problem& p, Layout layout) const {
    Args out;
    out.out_features = p.N;
    out.in_features = p.K;
    out.r = p.r;
    out.lora_A = lora_A.data();
    out.lora_B = lora_B.data();
    out.scaling = 0.75;
    out.weight_layout = layout;
    out.weight = packed[int(layout)].data();
    if (layout != Layout::sparse24) out.mask = bits.data();
    if (layout == Layout::sparse24) out.metadata = metadata.data();
    if (layout == Layout::bitmap) out.row_offsets = row_offsets.data();
    out.quantization.grid = p.grid;
    out.quantization.group = p.group;
    out.quantization.scales = scales.bytes.data();
    out.quantization.scales_dtype = p.scales_dtype;
    out.quantization.zero_points = p.zero_points ? zeros.data() : nullptr;
    return out;
  }
  // The same of the float32 weight.
  template <typename Args>
  Args plain(const Problem& p) const {
    Args out = args<Args>(p, Layout::dense);
    out.weight = weight.bytes.data();
    out.quantization = {};
    return out;
  }

  Mask mask;
  std::vector<uint32_t> bits;
  Elements scales;
  std::vector<float> step;
  std::vector<int8_t> zeros;
  Elements weight;
  std::vector<uint8_t> packed[3], metadata;
  std::vector<int64_t> row_offsets;
  std::vector<float> lora_A, lora_B;
};

class Quantized : public testing::TestWithParam<const cpu::KernelTable*> {
 protected:
  void SetUp() override {
    using cpu::unsupported;
    LORS_SKIP_UNSUPPORTED(GetParam());
  }

  std::vector<unsigned char> merged(MergeArgs args, DType dtype, DType round_to, const CpuHost* host = nullptr) {
    GuardedBytes out(args.out_features * args.in_features * dtype_size(dtype), host ? dtype_size(dtype) : 0);
    args.merged = out.data();
    args.merged_dtype = dtype;
    args.round_to = round_to;
    const Status status = merge_with(*GetParam(), args, host);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_TRUE(out.intact());
    return out.values();
  }
  std::vector<float> merged_floats(const MergeArgs& args) {
    const std::vector<unsigned char> bytes = merged(args, DType::float32, DType::float32);
    std::vector<float> out(bytes.size() / 4);
    std::memcpy(out.data(), bytes.data(), bytes.size());
    return out;
  }
};

// Every grid with every size of groups that K allows, scales of each type, with and without zero points, in turn.
std::vector<Problem> problems(std::initializer_list<int64_t> sides, int64_t r) {
  std::vector<Problem> out;
  const DType types[] = {DType::float32, DType::bfloat16, DType::float16};
  for (const int64_t K : sides)
    for (const int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, K})
      for (const Grid grid : kGrids)
        for (const bool zeros : {false, true})
          if (K % group == 0 && !(grid == Grid::e4m3 && zeros))
            out.push_back({grid, 1 + int64_t(out.size()) % 13, K, r, group, types[out.size() % 3], zeros});
  return out;
}

constexpr std::pair<DType, DType> kResults[] = {{DType::float32, DType::float32},
                                                {DType::float32, DType::bfloat16},
                                                {DType::float32, DType::float16},
                                                {DType::bfloat16, DType::bfloat16},
                                                {DType::float16, DType::float16}};

#define LORS_TRACE(p)                                                                                                   \
  SCOPED_TRACE(testing::Message() << "grid " << int((p).grid) << " " << (p).N << "x" << (p).K << " group " << (p).group \
                                  << " r=" << (p).r << " scales " << int((p).scales_dtype) << " z " << (p).zero_points)

TEST_P(Quantized, MergesAsTheDequantisedWeight) {
  std::mt19937_64 rng(1);
  for (const int64_t r : {0, 1, 5})
    for (const Problem& p : problems({4, 6, 36, 40, 64, 96, 128, 384, 1056}, r)) {
      LORS_TRACE(p);
      const Operands o(p, rng);
      for (const auto& [dtype, round_to] : kResults) {
        const auto want = merged(o.plain<MergeArgs>(p), dtype, round_to);
        for (const Layout layout : kLayouts) {
          if (layout == Layout::sparse24 && p.K % 4) continue;
          EXPECT_EQ(merged(o.args<MergeArgs>(p, layout), dtype, round_to), want) << int(layout) << " to " << int(dtype);
          EXPECT_EQ(merged(o.args<MergeArgs>(p, layout), dtype, round_to, &kPieces), want) << int(layout);
        }
      }
      if (HasFailure()) return;
    }
}

TEST_P(Quantized, EveryE4M3Code) {
  const uint32_t all[8] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  uint8_t codes[256];
  for (int i = 0; i < 256; ++i) codes[i] = uint8_t(i);
  const float scale = 0.75f;
  MergeArgs args;
  args.out_features = 1;
  args.in_features = 256;
  args.weight = codes;
  args.mask = all;
  args.quantization.grid = Grid::e4m3;
  args.quantization.group = 256;
  args.quantization.scales = &scale;
  const std::vector<float> out = merged_floats(args);
  for (size_t i = 0; i < 256; ++i) {
    const float want = number_of(Grid::e4m3, uint8_t(i)) * scale;
    EXPECT_TRUE(out[i] == want || (std::isnan(want) && std::isnan(out[i]))) << i << ": " << out[i];
  }
}

// The value that v becomes on the grid.
float requantized(const Problem& p, const Operands& o, int64_t steps, int64_t seed, int64_t n, int64_t k, float v) {
  if (!std::isfinite(v)) return std::numeric_limits<float>::quiet_NaN();
  const size_t g = size_t(n * (p.K / p.group) + k / p.group);
  const float step = float(steps) * o.step[g], inverse = 1.0f / step, zero = float(o.zeros[g]) / float(steps);
  if (p.grid == Grid::e4m3) return nearest_e4m3(v * inverse) * step;
  volatile float u = 0.0f;
  if (seed >= 0) u = float(int32_t(random_dither(random_row(uint64_t(seed), n), uint32_t(k)))) * kDitherUnit;
  const bool is_int4 = p.grid == Grid::int4 || steps == 16;
  const float code = std::nearbyint(std::fma(v, inverse, float(u))) + zero;
  const float least = is_int4 ? -8.0f : -128.0f, most = is_int4 ? 7.0f : 127.0f;
  return ((code < least ? least : code > most ? most : code) - zero + 0.0f) * step;
}

std::vector<int64_t> steps_of(Grid grid) { return grid == Grid::int8 ? std::vector<int64_t>{1, 16} : std::vector<int64_t>{1}; }

TEST_P(Quantized, RequantisesByTheFormula) {
  std::mt19937_64 rng(2);
  for (const int64_t r : {0, 4})
    for (const Problem& p : problems({4, 6, 40, 64, 96, 1056}, r)) {
      LORS_TRACE(p);
      Operands o(p, rng);
      if (r) {  // some far beyond the last codes, some in the middle between two, and what is not finite
        o.lora_B[0] = 1e6f;
        if (p.N > 2) o.lora_B[size_t(2 * r)] = std::numeric_limits<float>::infinity();
        if (p.N > 3) o.lora_B[size_t(3 * r)] = std::numeric_limits<float>::quiet_NaN();
        if (p.N > 4) std::fill_n(o.lora_B.begin() + 4 * r, r, 0.0f);
      }
      const std::vector<float> unrounded = merged_floats(o.plain<MergeArgs>(p));
      for (const int64_t steps : steps_of(p.grid))
        for (const int64_t seed : {int64_t{-1}, int64_t(rng() >> 1)}) {
          if (p.grid == Grid::e4m3 && seed >= 0) continue;
          std::vector<float> want(unrounded.size());
          for (int64_t i = 0; i < p.N * p.K; ++i)
            if (o.mask.kept[size_t(i)])
              want[size_t(i)] = requantized(p, o, steps, seed, i / p.K, i % p.K, unrounded[size_t(i)]);
          // Rounded by the merge of a float32 weight.
          const std::vector<uint32_t> all(size_t(p.N * mask_words(p.K)), ~0u);
          MergeArgs plain;
          plain.out_features = p.N;
          plain.in_features = p.K;
          plain.weight = want.data();
          plain.mask = all.data();
          for (const auto& [dtype, round_to] : kResults) {
            Elements rounded(dtype, 0);
            rounded.bytes = merged(plain, dtype, round_to);
            for (const Layout layout : kLayouts) {
              if (layout == Layout::sparse24 && p.K % 4) continue;
              MergeArgs args = o.args<MergeArgs>(p, layout);
              args.quantization.requantize_steps = steps;
              args.quantization.dither_seed = seed;
              for (const CpuHost* host : {static_cast<const CpuHost*>(nullptr), &kPieces}) {
                Elements got(dtype, 0);
                got.bytes = merged(args, dtype, round_to, host);
                for (int64_t i = 0; i < got.size(); ++i) {
                  const bool is_nan = std::isnan(want[size_t(i)]);
                  const uint64_t infinity = ((uint64_t{1} << (8 * dtype_size(dtype) - 1 - fraction_bits(dtype))) - 1)
                                            << fraction_bits(dtype);
                  if (is_nan ? (got.get(i) & ~got.sign()) <= infinity : got.get(i) != rounded.get(i)) {
                    ADD_FAILURE() << "[" << i / p.K << ", " << i % p.K << "] is " << got.get(i) << ", not " << rounded.get(i)
                                  << " of " << unrounded[size_t(i)] << ", steps " << steps << " seed " << seed << " layout "
                                  << int(layout) << " to " << int(dtype);
                    return;
                  }
                }
              }
            }
          }
        }
    }
}

// Rows by themselves, with bfloat16 adapters that some tables would multiply in pairs.
TEST_P(Quantized, RowsAreRequantisedAsInTheWhole) {
  std::mt19937_64 rng(3);
  for (const Problem& p : problems({64, 384}, 4)) {
    LORS_TRACE(p);
    Operands o(p, rng);
    Elements A(DType::bfloat16, p.r * p.K), B(DType::bfloat16, p.N * p.r);
    const auto shorten = [](Elements& to, std::vector<float>& from) {
      for (int64_t i = 0; i < to.size(); ++i) {
        const uint32_t bits = uint32_t(as_bits(DType::float32, from[size_t(i)])) & 0xffff0000u;
        std::memcpy(&from[size_t(i)], &bits, 4);
        to.set(i, bits >> 16);
      }
    };
    shorten(A, o.lora_A);
    shorten(B, o.lora_B);
    for (const Layout layout : kLayouts) {
      MergeArgs args = o.args<MergeArgs>(p, layout);
      args.quantization.requantize_steps = 1;
      args.quantization.dither_seed = p.grid == Grid::e4m3 ? -1 : 7;
      const std::vector<float> whole = merged_floats(args);
      args.lora_A = A.bytes.data();
      args.lora_B = B.bytes.data();
      args.lora_A_dtype = args.lora_B_dtype = DType::bfloat16;
      EXPECT_EQ(merged_floats(args), whole);
      const int64_t begin = p.N / 2, groups = p.K / p.group, half = p.grid == Grid::int4 ? 2 : 1;
      args.out_features = p.N - begin;
      args.lora_B = B.bytes.data() + begin * p.r * 2;
      if (args.mask) args.mask += begin * mask_words(p.K);
      if (args.metadata) args.metadata += begin * sparse24_metadata_bytes(p.K);
      if (args.row_offsets) args.row_offsets += begin;
      if (layout != Layout::bitmap)
        args.weight = o.packed[int(layout)].data() + begin * p.K / (layout == Layout::sparse24 ? 2 : 1) / half;
      args.quantization.scales = o.scales.bytes.data() + begin * groups * dtype_size(p.scales_dtype);
      if (p.zero_points) args.quantization.zero_points += begin * groups;
      args.quantization.first_row = begin;
      EXPECT_EQ(merged_floats(args), std::vector<float>(whole.begin() + begin * p.K, whole.end()));
    }
    if (HasFailure()) return;
  }
}

// Few tokens and more, whole and partial panels, one piece and several.
TEST_P(Quantized, FusedLinearAsOfTheDequantisedWeight) {
  std::mt19937_64 rng(4);
  for (const int64_t r : {0, 3})
    for (Problem p : problems({6, 36, 256, 1056}, r)) {
      p.N = p.K == 256 ? 70 : p.N;
      LORS_TRACE(p);
      const Operands o(p, rng);
      for (const DType round_to : {DType::bfloat16, DType::float32})
        for (const int64_t T : {1, 8, 9, 30})
          for (const bool gradient : {false, true}) {
            std::vector<float> activation(size_t(T * (gradient ? p.N : p.K)));
            for (float& x : activation) x = float(int(rng() % 17) - 8);
            const auto output = [&](FusedLinearArgs args, const CpuHost* host) {
              Guarded<float> out(T * (gradient ? p.K : p.N));
              args.tokens = T;
              args.input_gradient = gradient;
              args.activation = activation.data();
              args.round_to = round_to;
              args.output = out.data();
              const Status status = fused_linear_with(*GetParam(), args, host);
              EXPECT_TRUE(status.ok()) << status.message();
              EXPECT_TRUE(out.intact());
              return out.values();
            };
            const std::vector<float> dense = output(o.args<FusedLinearArgs>(p, Layout::dense), nullptr);
            // Without an adapter and rounding, few tokens are multiplied with stored float32 values in another order.
            if (r > 0 || gradient || T > 8 || round_to != DType::float32) {
              EXPECT_EQ(dense, output(o.plain<FusedLinearArgs>(p), nullptr)) << T << " " << gradient;
            }
            for (const Layout layout : kLayouts) {
              if (layout == Layout::sparse24 && p.K % 4) continue;
              EXPECT_EQ(output(o.args<FusedLinearArgs>(p, layout), &kPieces), dense) << int(layout) << " " << T << gradient;
            }
          }
      if (HasFailure()) return;
    }
}

TEST_P(Quantized, WhatIsRefused) {
  std::mt19937_64 rng(5);
  const Problem p{Grid::int4, 3, 64, 1, 32, DType::float32, false};
  const Operands o(p, rng);
  std::vector<float> out(size_t(p.N * p.K));
  const auto refused = [&](auto change, const char* sentence) {
    MergeArgs args = o.args<MergeArgs>(p, Layout::dense);
    args.merged = out.data();
    change(args);
    const std::string message = merge_with(*GetParam(), args, nullptr).message();
    EXPECT_NE(message.find(sentence), std::string::npos) << message;
  };
  refused([](MergeArgs& args) { args.quantization.group = 16; }, "groups of 32, 64 or 128 columns");
  refused([](MergeArgs& args) { args.quantization.requantize_steps = 16; }, "16 from int8 alone");
  refused([](MergeArgs& args) { args.mask = nullptr; }, "as mask bits");
  refused(
      [](MergeArgs& args) {
        args.quantization.requantize_steps = 1;
        args.draws.rounds = true;
      },
      "asked for both");
  FusedLinearArgs fused = o.args<FusedLinearArgs>(p, Layout::dense);
  fused.tokens = 1;
  fused.activation = fused.output = out.data();
  fused.quantization.requantize_steps = 1;
  EXPECT_NE(fused_linear_with(*GetParam(), fused, nullptr).message().find("requantises nothing"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Tables, Quantized, testing::ValuesIn(cpu::kTables), cpu::table_name);

}  // namespace
}  // namespace lors::test
