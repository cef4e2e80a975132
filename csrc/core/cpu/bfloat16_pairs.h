// SPDX-License-Identifier: Apache-2.0
// sum[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1], the bfloat16 matmul instruction, where there is one: twice the multiply-adds of a
// float32 vector. A float32 lane holds a pair.
// Products of two bfloat16 numbers are exact in float32 and each addition rounds to nearest, so the error bound is that of
// float32 multiply-adds. Only numbers below 2^-126 are different: the instruction takes them for 0, as operands and as sums.
// Hence pairs_are_exact: between factors of at least 2^-kPairExponent every nonzero sum is at least 2^-126, since it is a
// multiple of 2^(-2 kPairExponent - 14), the last bit of the smallest product. Float32 adapters would need three bfloat16
// products (A1 B1 + A1 B2 + A2 B1), 1.5 times the float32 instructions, and have an error of 2^-17 instead of 2^-24.
#pragma once

#include "vector.h"

namespace {

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512BF16__)

constexpr bool kHasPairs = true;
constexpr int kPairExponent = 56;

inline Vector<float> multiply_add_pairs(Vector<float> a, Vector<float> b, Vector<float> sum) {
  return _mm512_dpbf16_ps(sum, load_raw<__m512bh>(&a), load_raw<__m512bh>(&b));
}

// Rounded by itself: an addition that follows is not fused with it, in no layout.
inline Vector<float> multiply_rounded(Vector<float> a, Vector<float> b) {
  return _mm512_maskz_mul_round_ps(0xffff, a, b, kToNearest);
}

// Whether all are 0 or between 2^-kPairExponent and 2^kPairExponent; no infinity, no NaN. Any sum of fewer than 2^14 products
// of such numbers is also finite.
inline bool pairs_are_exact(const void* elements, int64_t count) {
  const auto* element = static_cast<const uint16_t*>(elements);
  constexpr uint16_t least = (127 - kPairExponent) << 7, most = (127 + kPairExponent) << 7;
  unsigned outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t magnitude = element[i] & 0x7fff;
    outside |= unsigned(magnitude != 0) & unsigned(uint16_t(magnitude - least) > most - least);
  }
  return outside == 0;
}
constexpr auto kPairsAreExact = pairs_are_exact;

#else

constexpr bool kHasPairs = false;
inline Vector<float> multiply_add_pairs(Vector<float>, Vector<float>, Vector<float> sum) { return sum; }
inline Vector<float> multiply_rounded(Vector<float> a, Vector<float>) { return a; }
constexpr bool (*kPairsAreExact)(const void*, int64_t) = nullptr;

#endif

}  // namespace
