// SPDX-License-Identifier: Apache-2.0
// Expands packed kept weights to the lanes of a vector, and compresses them. Lane i of an expanded vector is the packed element
// whose index is the number of mask bits below i; lanes without a bit are undefined. AVX-512 has instructions for both, AVX2
// permutes with indices from a table; elsewhere it is done lane by lane.
#pragma once

#include <type_traits>

#include "codes.h"
#include "sparse24_codes.h"
#include "vector.h"

namespace {

// Whether lane i's bit is set.
template <typename Acc>
inline Keep<Acc> keep_bits(uint32_t bits) {
  Keep<Acc> lane;
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = 1 << i;
  return ((Keep<Acc>{} + std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>(bits)) & lane) != 0;
}

// v where a lane's bit is set, +0 elsewhere.
template <typename Acc>
inline Vector<Acc> where_bits(uint32_t bits, Vector<Acc> v) {
  return keep_bits<Acc>(bits) ? v : Vector<Acc>{};
}

// The two groups of a byte of metadata are lanes 0 to 7; with fewer lanes, those that begin at column % 8.
template <typename Acc>
inline uint32_t metadata_bits(const uint8_t* table, const uint8_t* metadata, int64_t column) {
  if constexpr (kLanes<Acc> == 16) return table[metadata[column / 8]] | uint32_t(table[metadata[column / 8 + 1]]) << 8;
  return uint32_t(table[metadata[column / 8]]) >> (column % 8);
}

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)

template <>
inline Vector<float> where_bits<float>(uint32_t bits, Vector<float> v) {
  return _mm512_maskz_mov_ps(__mmask16(bits), v);
}
template <>
inline Vector<double> where_bits<double>(uint32_t bits, Vector<double> v) {
  return _mm512_maskz_mov_pd(__mmask8(bits), v);
}
// The instructions could write the zeros themselves. But on AMD's Zen 4 they then wait for what their register held before, and
// from memory they are slow: so they are given zeros, and a register, in a way that the compiler does not undo.
template <typename V>
inline V zeros_for(V& operand) {
  V zeros{};
  asm("" : "+v"(zeros), "+v"(operand));
  return zeros;
}
inline Vector<float> expand(Vector<float> v, uint32_t bits) {
  __m512 packed = v, zeros = zeros_for(packed);
  return _mm512_mask_expand_ps(zeros, __mmask16(bits), packed);
}
inline Vector<double> expand(Vector<double> v, uint32_t bits) {
  __m512d packed = v, zeros = zeros_for(packed);
  return _mm512_mask_expand_pd(zeros, __mmask8(bits), packed);
}
#if defined(__AVX512VBMI2__)
inline __m512i expand_words(__m512i packed, uint32_t bits) {
  const __m512i zeros = zeros_for(packed);
  return _mm512_mask_expand_epi16(zeros, bits, packed);
}
#endif
inline Vector<float> compress(Vector<float> v, uint32_t bits) {
  __m512 kept = v, zeros = zeros_for(kept);
  return _mm512_mask_compress_ps(zeros, __mmask16(bits), kept);
}
inline Vector<double> compress(Vector<double> v, uint32_t bits) {
  __m512d kept = v, zeros = zeros_for(kept);
  return _mm512_mask_compress_pd(zeros, __mmask8(bits), kept);
}
inline Vector<float> join_halves(Vector<float> low, Vector<float> high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}
inline Vector<double> join_halves(Vector<double> low, Vector<double> high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
}

// Half a vector of elements as Acc, in the lower lanes.
inline Vector<float> load_half(const float* p) { return _mm512_castps256_ps512(_mm256_loadu_ps(p)); }
inline Vector<float> load_half(const bfloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_castps256_ps512(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
inline Vector<float> load_half(const float16* p) {
  return _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vector<double> load_half(const double* p) { return _mm512_castpd256_pd512(_mm256_loadu_pd(p)); }

#elif LORS_VECTOR_BYTES == 32 && defined(__AVX2__)

struct Permutations {
  alignas(64) uint8_t expand[256][8] = {}, compress[256][8] = {};
  uint8_t twice[16] = {};  // each bit of a nibble doubled: a float64 is two 32-bit lanes
  constexpr Permutations() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        expand[bits][lane] = uint8_t(count);
        if (bits >> lane & 1) compress[bits][count++] = uint8_t(lane);
        if (bits < 16 && bits >> (lane / 2) & 1) twice[bits] = uint8_t(twice[bits] | 1 << lane);
      }
    }
  }
};
constexpr Permutations kPermutations;

inline Vector<float> permute(Vector<float> v, const uint8_t* lanes) {
  return _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes))));
}
inline Vector<float> expand(Vector<float> packed, uint32_t bits) { return permute(packed, kPermutations.expand[bits & 255]); }
inline Vector<double> expand(Vector<double> packed, uint32_t bits) {
  return _mm256_castps_pd(expand(Vector<float>(_mm256_castpd_ps(packed)), kPermutations.twice[bits & 15]));
}
inline Vector<float> compress(Vector<float> v, uint32_t bits) { return permute(v, kPermutations.compress[bits & 255]); }
inline Vector<double> compress(Vector<double> v, uint32_t bits) {
  return _mm256_castps_pd(compress(Vector<float>(_mm256_castpd_ps(v)), kPermutations.twice[bits & 15]));
}
inline Vector<float> join_halves(Vector<float> low, Vector<float> high) {
  return _mm256_insertf128_ps(low, _mm256_castps256_ps128(high), 1);
}
inline Vector<double> join_halves(Vector<double> low, Vector<double> high) {
  return _mm256_insertf128_pd(low, _mm256_castpd256_pd128(high), 1);
}

inline Vector<float> load_half(const float* p) { return _mm256_castps128_ps256(_mm_loadu_ps(p)); }
inline Vector<float> load_half(const bfloat16* p) {
  const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castps128_ps256(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
inline Vector<float> load_half(const float16* p) {
  return _mm256_castps128_ps256(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vector<double> load_half(const double* p) { return _mm256_castpd128_pd256(_mm_loadu_pd(p)); }

#else
#define LORS_EXPANDS_BY_LANE
#endif

// Not inlined lane by lane: unrolled within a tile it takes minutes to compile.
#if defined(LORS_EXPANDS_BY_LANE)
#define LORS_EXPAND_INLINE __attribute__((noinline))
#else
#define LORS_EXPAND_INLINE inline
#endif

// One vector of weights in layout 2:4: `slots` are those of its columns, `column` counts from the first group of *metadata.
template <typename Acc, typename W>
LORS_EXPAND_INLINE Vector<Acc> load_sparse24(const W* slots, const uint8_t* metadata, int64_t column) {
#if defined(LORS_EXPANDS_BY_LANE)
  // From the start of the group, because a vector of two float64 is half a group.
  const uint32_t placed = metadata_bits<Acc>(kSparse24Codes.placed_of_byte, metadata, column & ~int64_t{3});
  Vector<Acc> v;
  for (int i = 0; i < kLanes<Acc>; ++i) {
    const int lane = i + int(column % 4);
    const uint32_t below = (placed >> (lane & ~3)) & ((1u << (lane & 3)) - 1);
    v[i] = element<Acc>(slots, i / 4 * 2 + (below != 0));
  }
  return v;
#else
  return expand(load_half(slots), metadata_bits<Acc>(kSparse24Codes.placed_of_byte, metadata, column));
#endif
}

// One vector of weights in layout "bitmap"; advances `values` by the number of bits. Always reads a whole vector.
template <typename Acc, typename Pointer>
LORS_EXPAND_INLINE Vector<Acc> load_bitmap(Pointer& values, uint32_t bits) {
#if defined(LORS_EXPANDS_BY_LANE)
  Vector<Acc> v;
  for (int i = 0; i < kLanes<Acc>; ++i) {
    v[i] = element<Acc>(values, 0);
    values += bits >> i & 1;
  }
  return v;
#else
  const Vector<Acc> v = expand(load<Acc>(values), bits);
  values += __builtin_popcount(bits);
  return v;
#endif
}

// The slots of two vectors of merged weights that are +0 wherever nothing is kept: one vector.
template <typename Acc>
LORS_EXPAND_INLINE Vector<Acc> slots_of(Vector<Acc> low, Vector<Acc> high, const uint8_t* metadata, int64_t column) {
#if defined(LORS_EXPANDS_BY_LANE)
  Acc dense[2 * kLanes<Acc>];
  store_raw(dense, low);
  store_raw(dense + kLanes<Acc>, high);
  Vector<Acc> v;
  for (int s = 0; s < kLanes<Acc>; ++s) {
    const int64_t at = column + s / 2 * 4;
    v[s] = dense[s / 2 * 4 + kSparse24Codes.of_code[metadata[at / 8] >> (at % 8) & 15].slot[s % 2]];
  }
  return v;
#else
#if LORS_VECTOR_BYTES == 64
  if constexpr (kLanes<Acc> == 16) {
    // Two bits of a code are a position; with those of its group they index the 32 lanes. Of a group's two slots one is a
    // filler where both positions agree (slot 0 at position 3); where none is kept, both read lanes that are +0 anyway.
    uint32_t codes;
    std::memcpy(&codes, metadata + column / 8, 4);
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i positions =
        _mm512_and_si512(_mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(int(codes)), shifts), _mm512_set1_epi32(3));
    const __m512i others = _mm512_maskz_shuffle_epi32(0xffff, positions, _MM_PERM_CDAB);
    const __mmask16 alone = _mm512_cmpeq_epi32_mask(positions, others);
    const __mmask16 last = _mm512_cmpeq_epi32_mask(positions, _mm512_set1_epi32(3));
    const __mmask16 filler = alone & (last ^ 0xaaaa);
    return _mm512_maskz_permutex2var_ps(__mmask16(~filler), low, _mm512_or_si512(positions, groups), high);
  }
#endif
  const uint8_t* placed = kSparse24Codes.placed_of_byte;
  return join_halves(compress(low, metadata_bits<Acc>(placed, metadata, column)),
                     compress(high, metadata_bits<Acc>(placed, metadata, column + kLanes<Acc>)));
#endif
}

// The bits of `v` rounded to Out, with +0 for values that round to -0.0: compressed layouts store +0 only.
template <typename Out, typename Acc>
inline auto rounded_slots(Vector<Acc> v) {
  typedef std::conditional_t<sizeof(Out) == 2, uint16_t, std::conditional_t<sizeof(Out) == 4, uint32_t, uint64_t>> Bits;
  typedef Bits BitsVector __attribute__((vector_size(sizeof(Out) * kLanes<Acc>)));
  Out rounded[kLanes<Acc>];
  store<Out, Out, Acc>(rounded, v);
  const auto bits = load_raw<BitsVector>(rounded);
  return (bits + bits) != 0 ? bits : BitsVector{};
}

// The lanes of `v` whose bit is set, rounded, one behind the other; nothing beyond them is written.
template <typename Out, typename Acc>
LORS_EXPAND_INLINE void store_kept(Out* p, Vector<Acc> v, uint32_t bits) {
#if defined(LORS_EXPANDS_BY_LANE)
  const auto slots = rounded_slots<Out, Acc>(v);
  for (int i = 0; i < kLanes<Acc>; ++i)
    if (bits >> i & 1) std::memcpy(p++, reinterpret_cast<const Out*>(&slots) + i, sizeof(Out));
#else
  const auto slots = rounded_slots<Out, Acc>(compress(v, bits));
  const int count = __builtin_popcount(bits);
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    const __mmask16 inside = __mmask16((1u << count) - 1);
    if constexpr (sizeof(Out) == 2)
      _mm256_mask_storeu_epi16(p, inside, __m256i(slots));
    else
      _mm512_mask_storeu_epi32(p, inside, __m512i(slots));
    return;
  }
#endif
  std::memcpy(p, &slots, size_t(count) * sizeof(Out));
#endif
}

// store or store_streaming of rounded_slots.
template <typename Out, typename Acc>
inline void store_slots(Out* p, Vector<Acc> v, bool streaming) {
  const auto slots = rounded_slots<Out, Acc>(v);
  if constexpr (std::is_same_v<Out, Acc>)
    if (streaming) return store_streaming<Out, Out, Acc>(p, load_raw<Vector<Acc>>(&slots));
  store_raw(p, slots);
}

}  // namespace
