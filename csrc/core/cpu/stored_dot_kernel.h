// SPDX-License-Identifier: Apache-2.0
// out[t, n] = sum_k activation[t, k] weight[n, k] + bias[n] for a few tokens, without an adapter: the stored values are
// multiplied as they are. One or two rows at a time, with a sum for each row and token in registers. Zeros are put where
// nothing is kept, so that every layout adds in the same order and the same bits come out; but one or two bfloat16 tokens are
// chosen for the slots of a 2:4 weight where the processor can (MultiplySlots), which adds in an order of its own.
//
// With AVX512_BF16 bfloat16 values are multiplied in pairs by vdpbf16ps, which takes subnormal numbers as zero and writes zero
// for subnormal sums. A term loses less than 2^-126 |activation| by the first, and a sum less than 2^-126 by the second. So if
//   |out| >= limit = 2^25 K 2^-126 (1 + max |activation|)
// all of it together is below 2^-25 |out|, less than float32 rounds by. Rows with a smaller result are computed in float32
// arithmetic, with a number for each column, and so are tokens that have a subnormal activation, or an infinite one or NaN: its
// products with the zeros are NaN.
#pragma once

#include "stored_row.h"

#if defined(__AVX2__)
namespace {

constexpr bool kDotsStored = true;

// How a unit is multiplied by a token's activations: X is the activations' type, add() multiplies vector v of kVectors.
struct MultiplyFloats {
  using X = float;
  using Sum = Vector<float>;
  static constexpr int kVectors = Floats::kVectors;
  static Sum add(Sum sum, const Floats& w, const float* x, int v) {
    return sum + w.vector[v] * load<float>(x + v * kLanes<float>);
  }
};

#if defined(__AVX512VBMI2__)
struct MultiplyPairs {
  using X = bfloat16;
  using Sum = Vector<float>;
  static constexpr int kVectors = 1;
  static Sum add(Sum sum, const Words& w, const bfloat16* x, int) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w.all, (__m512bh)_mm512_loadu_si512(x));
  }
};

// The activations of the slots' columns: one permutation where zeros would take two expansions and another product.
struct MultiplySlots {
  using X = bfloat16;
  using Sum = Vector<float>;
  static constexpr int kVectors = 1;
  static Sum add(Sum sum, const Slots& w, const bfloat16* x, int) {
    const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + 32);
    return _mm512_dpbf16_ps(sum, (__m512bh)w.values, (__m512bh)_mm512_permutex2var_epi16(first, w.columns, second));
  }
};

// MultiplyPairs in float32 arithmetic: even columns, then odd ones.
struct MultiplyWidened {
  using X = bfloat16;
  using Sum = Vector<float>;
  static constexpr int kVectors = 2;
  static __m512 widen(__m512i pairs, int odd) {
    return _mm512_castsi512_ps(odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                   : _mm512_maskz_slli_epi32(0xffff, pairs, 16));
  }
  static Sum add(Sum sum, const Words& w, const bfloat16* x, int v) {
    return sum + Sum(widen(w.all, v)) * Sum(widen(_mm512_loadu_si512(x), v));
  }
};

struct MultiplyHalves {
  using X = float;
  using Sum = Vector<float>;
  static constexpr int kVectors = 2;
  static Sum add(Sum sum, const Words& w, const float* x, int v) {
    const __m256i half = v ? _mm512_maskz_extracti64x4_epi64(15, w.all, 1) : _mm512_maskz_extracti64x4_epi64(15, w.all, 0);
    return sum + Sum(_mm512_maskz_cvtph_ps(0xffff, half)) * load<float>(x + v * 16);
  }
};
template <typename W>
using MultiplyWords = std::conditional_t<std::is_same_v<W, bfloat16>, MultiplyPairs, MultiplyHalves>;
#else
// bfloat16: of each sixteen activations the even ones come first (pack_dot), so that a shift and a mask widen the columns.
template <typename W>
struct MultiplyWords {
  using X = float;
  typedef float Sum __attribute__((vector_size(32)));
  static constexpr int kVectors = 4;
  static __m256 widen(__m256i half, int second) {
    if constexpr (std::is_same_v<W, float16>)
      return _mm256_cvtph_ps(second ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
    return _mm256_castsi256_ps(second ? _mm256_and_si256(half, _mm256_set1_epi32(int(0xffff0000)))
                                      : _mm256_slli_epi32(half, 16));
  }
  static Sum add(Sum sum, const Words& w, const float* x, int v) {
    return sum + Sum(widen(w.half[v / 2], v % 2)) * Sum(_mm256_loadu_ps(x + v * 8));
  }
};
#endif
template <typename W>
using Multiply = typename std::conditional_t<std::is_same_v<W, float>, std::enable_if<true, MultiplyFloats>,
                                             std::enable_if<true, MultiplyWords<W>>>::type;

template <typename Sum>
inline float sum_of_lanes(Sum sum) {
  float lanes[sizeof(Sum) / 4];
  store_raw(lanes, sum);
  for (int half = int(sizeof(Sum)) / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// out[i][t] for rows n to n + Rows - 1.
template <typename Row, typename By, int Rows, int Tokens, int... I>
inline void stored_dot(const lors::cpu::DotJob& job, int64_t n, float (&out)[Rows][Tokens], std::integer_sequence<int, I...>) {
  using Sum = typename By::Sum;
  // Sums that do not wait for each other: a multiply-add takes four cycles.
  constexpr int kChains = Rows * Tokens > 4 ? 1 : Rows * Tokens > 2 ? 2 : 4;
  const auto* activation = static_cast<const typename By::X*>(job.activation);
  Sum sum[Rows][Tokens][kChains];
  Row rows[Rows] = {Row(job.weight, n + I)...};
#pragma GCC unroll 2
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) sum[i][t][c] = Sum{};
  // Unit u as `read` gives it, into the sums from `chain` on.
  const auto step = [&](auto read, int64_t u, int chain) __attribute__((always_inline)) {
    const decltype(read(rows[0], u)) unit[Rows] = {read(rows[I], u)...};
    const auto* x = activation + u * Row::kUnit;
#pragma GCC unroll 4
    for (int v = 0; v < By::kVectors; ++v)
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) {
          Sum& s = sum[i][t][(chain + v) % kChains];
          s = By::add(s, unit[i], x + t * job.stride, v);
        }
  };
  const auto steps = [&](auto read, int64_t u, int64_t last) __attribute__((always_inline)) {
    for (; u + 4 <= last; u += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) step(read, u + i, i * By::kVectors);
    for (; u < last; ++u) step(read, u, 0);
  };
  const int64_t K = job.weight.in_features, units = K / Row::kUnit;
  for (int64_t first = 0; first < units; first += kChunk) {
    const int64_t last = first + kChunk < units ? first + kChunk : units;
    for (int i = 0; i < Rows; ++i) rows[i].begin(first);
    if ((rows[I].readable() && ...))
      steps([](Row& row, int64_t u) { return row.unit(u); }, first, last);
    else
      steps([](Row& row, int64_t u) { return row.part(u, Row::kUnit); }, first, last);
  }
  if (K % Row::kUnit) step([K](Row& row, int64_t u) { return row.part(u, K % Row::kUnit); }, units, 0);
#pragma GCC unroll 2
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum[i][t][0] += sum[i][t][c];
      out[i][t] = sum_of_lanes(sum[i][t][0]);
    }
}

#if defined(__AVX512VBMI2__)
// Replaces what vdpbf16ps may have lost too much of.
template <typename Row, int Tokens>
[[gnu::noinline]] void correct_small(const lors::cpu::DotJob& job, int64_t n, float (&out)[Tokens]) {
  bool is_small = false;
  for (int t = 0; t < Tokens; ++t) is_small |= !(__builtin_fabsf(out[t]) >= job.limits[t]);  // NaN is
  if (!is_small) return;
  float again[1][Tokens];
  stored_dot<Row, MultiplyWidened>(job, n, again, std::integer_sequence<int, 0>{});
  for (int t = 0; t < Tokens; ++t)
    if (!(__builtin_fabsf(out[t]) >= job.limits[t])) out[t] = again[0][t];
}
#endif

template <typename W, typename Row, int Tokens>
void stored_dot_rows(const lors::cpu::DotJob& job, int64_t begin, int64_t end) {
  const auto rows_of = [&](auto rows, int64_t n) {
    constexpr int Rows = decltype(rows)::value;
    constexpr auto kRowIndices = std::make_integer_sequence<int, Rows>{};
    float out[Rows][Tokens];
#if defined(__AVX512VBMI2__)
    // More tokens share the expansions.
    if constexpr (std::is_same_v<Row, Sparse24Row<bfloat16>> && Tokens <= 2)
      stored_dot<Sparse24Slots, MultiplySlots>(job, n, out, kRowIndices);
    else
      stored_dot<Row, Multiply<W>>(job, n, out, kRowIndices);
    if constexpr (std::is_same_v<W, bfloat16>)
      for (int i = 0; i < Rows; ++i) correct_small<Row>(job, n + i, out[i]);
#else
    stored_dot<Row, Multiply<W>>(job, n, out, kRowIndices);
#endif
    for (int i = 0; i < Rows; ++i)
      for (int t = 0; t < Tokens; ++t) job.out[t * job.out_features + n + i] = (job.bias ? job.bias[n + i] : 0.0f) + out[i][t];
    return n + Rows;
  };
  // Two rows share the loads of the activations, but one is read faster.
  constexpr int kRows = Tokens > 2 && kVectorBytes == 64 ? 2 : 1;
  int64_t n = begin;
  while (end - n >= kRows) n = rows_of(std::integral_constant<int, kRows>{}, n);
  while (n < end) n = rows_of(std::integral_constant<int, 1>{}, n);
}

using StoredDot = void (*)(const lors::cpu::DotJob& job, int64_t begin, int64_t end);

template <typename W, template <typename> typename Row, int... Tokens>
inline StoredDot stored_dot_of(int64_t tokens, std::integer_sequence<int, Tokens...>) {
  constexpr StoredDot kOf[] = {stored_dot_rows<W, Row<W>, Tokens + 1>...};
  return kOf[tokens - 1];
}

template <typename W>
inline StoredDot stored_dot_of(const lors::cpu::DotJob& job) {
  const auto few = std::make_integer_sequence<int, int(lors::kFewTokens)>{};
  switch (job.weight.weight_layout) {
    case lors::Layout::sparse24: return stored_dot_of<W, Sparse24Row>(job.tokens, few);
    case lors::Layout::bitmap: return stored_dot_of<W, BitmapRow>(job.tokens, few);
    default: return stored_dot_of<W, DenseRow>(job.tokens, few);
  }
}

// Whether the stored values are multiplied as they are: each is one that rounding would not change.
inline bool is_stored_dot(const lors::cpu::DotJob& job) {
  const lors::cpu::MergeJob& weight = job.weight;
  if (weight.r > 0 || weight.steps.grid != lors::Grid::none ||
      (weight.round_to != lors::DType::float32 && weight.round_to != weight.weight_dtype))
    return false;
#if defined(__AVX512VBMI2__)
  if (weight.weight_dtype == lors::DType::bfloat16) return job.src_dtype == lors::DType::bfloat16;
#endif
  return true;
}

inline StoredDot stored_dot_of(const lors::cpu::DotJob& job) {
  switch (job.weight.weight_dtype) {
    case lors::DType::bfloat16: return stored_dot_of<bfloat16>(job);
    case lors::DType::float16: return stored_dot_of<float16>(job);
    default: return stored_dot_of<float>(job);
  }
}

#if defined(__AVX512VBMI2__)
// bfloat16 activations as they are, and their limit (see above): NaN, which no result reaches, with subnormal ones and with
// infinite ones and NaN.
inline void pack_stored_dot(const lors::cpu::DotJob& job, int64_t begin, int64_t end) {
  const int64_t K = job.weight.in_features;
  for (int64_t t = begin; t < end; ++t) {
    auto* dst = static_cast<bfloat16*>(job.activation) + t * job.stride;
    std::memcpy(dst, static_cast<const bfloat16*>(job.src) + t * K, size_t(K) * 2);
    std::memset(dst + K, 0, size_t(job.stride - K) * 2);
    uint16_t largest = 0, is_unusual = 0;
    for (int64_t k = 0; k < K; ++k) {
      const uint16_t magnitude = dst[k].bits & 0x7fff;
      largest = magnitude > largest ? magnitude : largest;
      is_unusual |= uint16_t(uint16_t(magnitude - 1) < 0x7f) | uint16_t(magnitude >= 0x7f80);
    }
    job.limits[t] = is_unusual ? __builtin_nanf("") : float(K) * 0x1p-101f * (1.0f + to_float(bfloat16{largest}));
  }
}
#else
// float32, of each sixteen the even ones first.
inline void pack_stored_dot(const lors::cpu::DotJob& job, int64_t begin, int64_t end) {
  const int64_t K = job.weight.in_features;
  with_type(job.src_dtype, [&](auto type) {
    for (int64_t t = begin; t < end; ++t) {
      const auto* src = static_cast<const decltype(type)*>(job.src) + t * K;
      float* dst = static_cast<float*>(job.activation) + t * job.stride;
      std::memset(dst, 0, size_t(job.stride) * 4);
      for (int64_t k = 0; k < K; ++k) dst[k / 16 * 16 + k % 2 * 8 + k % 16 / 2] = to_acc<float>(src[k]);
    }
  });
}
#endif

}  // namespace
#else
namespace {
constexpr bool kDotsStored = false;
}
#endif
