// SPDX-License-Identifier: Apache-2.0
// bits[k] = weight[k] != 0, where -0.0 is zero and a NaN is not: the mask of a weight without an explicit one. Works on bit
// patterns, so only the element size matters; the shift drops the sign.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

template <typename Bits>
inline uint32_t nonzero_word(const Bits* weight, int64_t count) {
  uint32_t word = 0;
  for (int64_t j = 0; j < count; ++j) word |= uint32_t(Bits(weight[j] << 1) != 0) << j;
  return word;
}

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline uint32_t nonzero_word(const uint16_t* weight) {
  return _mm512_test_epi16_mask(_mm512_loadu_si512(weight), _mm512_set1_epi16(0x7fff));
}
inline uint32_t nonzero_word(const uint32_t* weight) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const uint32_t low = _mm512_test_epi32_mask(_mm512_loadu_si512(weight), magnitude);
  return low | uint32_t(_mm512_test_epi32_mask(_mm512_loadu_si512(weight + 16), magnitude)) << 16;
}
#elif LORS_VECTOR_BYTES == 32 && defined(__AVX2__)
inline uint32_t nonzero_word(const uint16_t* weight) {
  // x + x drops the sign; the comparisons of 32 elements are narrowed to a byte each, with the quarters in the order 0 2 1 3.
  const auto zeros = [](const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cmpeq_epi16(_mm256_add_epi16(x, x), _mm256_setzero_si256());
  };
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(zeros(weight), zeros(weight + 16)), 0xd8);
  return ~uint32_t(_mm256_movemask_epi8(bytes));
}
inline uint32_t nonzero_word(const uint32_t* weight) {
  uint32_t zeros = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 8 * i));
    const __m256i is_zero = _mm256_cmpeq_epi32(_mm256_add_epi32(x, x), _mm256_setzero_si256());
    zeros |= uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(is_zero))) << 8 * i;
  }
  return ~zeros;
}
#else
inline uint32_t nonzero_word(const uint16_t* weight) { return nonzero_word(weight, 32); }
inline uint32_t nonzero_word(const uint32_t* weight) { return nonzero_word(weight, 32); }
#endif
inline uint32_t nonzero_word(const uint64_t* weight) { return nonzero_word(weight, 32); }

template <typename Bits>
void nonzero_as(const void* weight, int64_t count, uint32_t* bits) {
  const Bits* at = static_cast<const Bits*>(weight);
  for (; count >= 32; count -= 32, at += 32) *bits++ = nonzero_word(at);
  if (count > 0) *bits = nonzero_word(at, count);
}

void nonzero(const void* weight, int64_t element_size, int64_t count, uint32_t* bits) {
  if (element_size == 2) return nonzero_as<uint16_t>(weight, count, bits);
  if (element_size == 4) return nonzero_as<uint32_t>(weight, count, bits);
  nonzero_as<uint64_t>(weight, count, bits);
}

}  // namespace
