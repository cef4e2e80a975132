// SPDX-License-Identifier: Apache-2.0
// The stored codes of a quantised weight (lors/quantization.h) as one more element type of the merge's sources:
//   w = (q - z) s      q, z exact in float32, the product rounded by itself, so that no path fuses it with the sum that follows
//   e4m3: sign, 4 exponent bits with bias 7, 3 fraction bits; exponent 0 is subnormal, all ones but the sign is NaN
// and the requantised value of lors/quantization.h for rows that the merge has left in float32.
// Elements are counted in codes, of which two lie in an Int4Pair.
#pragma once

#include <lors/random.h>

#include <type_traits>

#include "kernels.h"
#include "vector.h"

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define LORS_LOOKS_UP_INT4
#endif

namespace {

struct E4M3 {
  uint8_t bits;
};
struct Int4Pair {
  uint8_t bits;
};

template <typename W>
constexpr bool kIsCode = std::is_same_v<W, int8_t> || std::is_same_v<W, E4M3> || std::is_same_v<W, Int4Pair>;
template <typename W>
constexpr int kCodesPerElement = std::is_same_v<W, Int4Pair> ? 2 : 1;
// The codes that a load at an odd Int4Pair's half may read beyond its vector.
template <typename W>
constexpr int kReadBeyond = std::is_same_v<W, Int4Pair> ? 16 : 0;

// The element that many codes further on: an even number of them where two lie in one.
template <typename W>
inline const W* forward(const W* from, int64_t codes) {
  return from + uint64_t(codes) / kCodesPerElement<W>;
}

// Where a code lies that may be the second of its byte.
struct Int4Pointer {
  const Int4Pair* first;
  int64_t at;
  Int4Pointer operator+(int64_t codes) const { return {first, at + codes}; }
  Int4Pointer& operator+=(int64_t codes) {
    at += codes;
    return *this;
  }
  int64_t operator-(const Int4Pointer& other) const { return at - other.at; }
  const Int4Pair* element() const { return first + (at >> 1); }
};
template <typename W>
using PointerTo = std::conditional_t<std::is_same_v<W, Int4Pair>, Int4Pointer, const W*>;
template <typename W>
inline PointerTo<W> pointer_to(const void* values, int64_t at) {
  if constexpr (std::is_same_v<W, Int4Pair>)
    return {static_cast<const Int4Pair*>(values), at};
  else
    return static_cast<const W*>(values) + at;
}
inline const void* address(const void* p) { return p; }
inline const void* address(const Int4Pointer& p) { return p.element(); }

// Copies `codes` of them to a buffer, and points to them there.
template <typename W>
inline PointerTo<W> copy_codes(W* to, PointerTo<W> from, int64_t codes) {
  if constexpr (std::is_same_v<W, Int4Pair>) {
    const int64_t odd = from.at & 1;
    std::memcpy(to, from.element(), size_t((odd + codes + 1) / 2));
    return {to, odd};
  } else {
    std::memcpy(to, from, size_t(codes) * sizeof(W));
    return to;
  }
}

// One element as Acc.
template <typename Acc, typename W>
inline Acc element(const W* from, int64_t i) {
  return to_acc<Acc>(from[i]);
}
inline float to_float(E4M3 code) {
  const int magnitude = code.bits & 0x7f, fraction = magnitude & 7, exponent = magnitude >> 3;
  if (magnitude == 0x7f) return __builtin_nanf("");
  uint32_t bits = uint32_t(120 + exponent) << 23 | uint32_t(fraction) << 20;
  float out = 0.0f;
  if (exponent) std::memcpy(&out, &bits, 4);
  if (!exponent) out = float(fraction) * 0x1p-9f;
  return code.bits & 0x80 ? -out : out;
}
template <>
inline float element<float, Int4Pair>(const Int4Pair* from, int64_t i) {
  return float(int8_t(uint8_t(from[i >> 1].bits << (i & 1 ? 0 : 4))) >> 4);
}
template <typename Acc>
inline Acc element(const Int4Pointer& from, int64_t i) {
  return element<Acc>(from.first, from.at + i);
}

// Codes as integers to their numbers; of an E4M3 its bits, whichever way they were widened. An int4 that is looked up stays
// what it is, for TileGrid.
template <typename W>
inline Vector<float> numbers_of(Keep<float> codes) {
#if defined(LORS_LOOKS_UP_INT4)
  if constexpr (std::is_same_v<W, Int4Pair>) return load_raw<Vector<float>>(&codes);
#endif
  if constexpr (!std::is_same_v<W, E4M3>) return __builtin_convertvector(codes, Vector<float>);
  const Keep<float> magnitude = codes & 0x7f;
  // Subnormal ones are given a leading one by the exponent 1, which is then taken away.
  const Keep<float> subnormal = magnitude < 8;
  const Keep<float> bits = (magnitude << 20) + ((subnormal ? Keep<float>{} + 121 : Keep<float>{} + 120) << 23);
  const auto leading = load_raw<Vector<float>>(&bits);
  const Vector<float> number = subnormal ? leading - 0x1p-6f : leading;
  const Keep<float> nan = Keep<float>{} + 0x7fc00000;
  const Keep<float> is_nan = magnitude == 0x7f;
  const Keep<float> out = (is_nan ? nan : load_raw<Keep<float>>(&number)) | ((codes & 0x80) << 24);
  return load_raw<Vector<float>>(&out);
}

// The codes of words that hold eight each, of which lane i wants number i % 8. Where they are looked up, in the lowest four
// bits of a lane, below anything.
inline Keep<float> nibbles(VectorOf<float>::bits words) {
  VectorOf<float>::bits shifts;
#if defined(LORS_LOOKS_UP_INT4)
  for (int i = 0; i < kLanes<float>; ++i) shifts[i] = uint32_t(4 * (i % 8));
  return Keep<float>(words >> shifts);
#else
  for (int i = 0; i < kLanes<float>; ++i) shifts[i] = uint32_t(28 - 4 * (i % 8));
  return Keep<float>(words << shifts) >> 28;
#endif
}
inline Keep<float> nibbles(uint32_t codes) { return nibbles(VectorOf<float>::bits{} + codes); }
inline Keep<float> nibbles(uint64_t codes) {
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i word_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i both = _mm512_castsi128_si512(_mm_cvtsi64_si128(int64_t(codes)));
  return nibbles(VectorOf<float>::bits(_mm512_maskz_permutexvar_epi32(0xffff, word_of_lane, both)));
#else
  if constexpr (kLanes<float> <= 8) return nibbles(uint32_t(codes));
  VectorOf<float>::bits words;
  for (int i = 0; i < kLanes<float>; ++i) words[i] = uint32_t(i < 8 ? codes : codes >> 32);
  return nibbles(words);
#endif
}
template <typename T>
inline T load_as(const void* p) {
  T out = 0;
  std::memcpy(&out, p, sizeof(T));
  return out;
}

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
inline Keep<float> widen_codes(__m128i bytes) { return Keep<float>(_mm512_maskz_cvtepi8_epi32(0xffff, bytes)); }
template <typename W>
inline Keep<float> load_codes(const W* p) {
  return widen_codes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Keep<float> load_codes(const Int4Pair* p) { return nibbles(load_as<uint64_t>(p)); }
template <typename W>
inline Keep<float> load_half_codes(const W* p) {
  return widen_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Keep<float> load_half_codes(const Int4Pair* p) { return nibbles(load_as<uint32_t>(p)); }
#elif LORS_VECTOR_BYTES == 32 && defined(__AVX2__)
inline Keep<float> widen_codes(__m128i bytes) { return Keep<float>(_mm256_cvtepi8_epi32(bytes)); }
template <typename W>
inline Keep<float> load_codes(const W* p) {
  return widen_codes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Keep<float> load_codes(const Int4Pair* p) { return nibbles(load_as<uint32_t>(p)); }
template <typename W>
inline Keep<float> load_half_codes(const W* p) {
  return widen_codes(_mm_cvtsi32_si128(load_as<int>(p)));
}
inline Keep<float> load_half_codes(const Int4Pair* p) { return nibbles(uint32_t(load_as<uint16_t>(p))); }
#else
template <typename W>
inline Keep<float> load_codes(const W* p) {
  Keep<float> codes;
  for (int i = 0; i < kLanes<float>; ++i) codes[i] = reinterpret_cast<const int8_t*>(p)[i];
  return codes;
}
inline Keep<float> load_codes(const Int4Pair* p) {
  if constexpr (kLanes<float> == 16) return nibbles(load_as<uint64_t>(p));
  return nibbles(kLanes<float> == 8 ? load_as<uint32_t>(p) : load_as<uint16_t>(p));
}
#endif

template <>
inline Vector<float> load<float, int8_t>(const int8_t* p) {
  return numbers_of<int8_t>(load_codes(p));
}
template <>
inline Vector<float> load<float, E4M3>(const E4M3* p) {
  return numbers_of<E4M3>(load_codes(p));
}
template <>
inline Vector<float> load<float, Int4Pair>(const Int4Pair* p) {
  return numbers_of<Int4Pair>(load_codes(p));
}
// Reads up to kReadBeyond codes beyond the vector.
template <typename Acc>
inline Vector<Acc> load(const Int4Pointer& p) {
  const Int4Pair* from = p.element();
  const int shift = int(p.at & 1) * 4;
  const uint64_t beyond = uint64_t(from[8].bits) << 1 << (63 - shift);
  return numbers_of<Int4Pair>(nibbles(load_as<uint64_t>(from) >> shift | beyond));
}
#if (LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (LORS_VECTOR_BYTES == 32 && defined(__AVX2__))
inline Vector<float> load_half(const int8_t* p) { return numbers_of<int8_t>(load_half_codes(p)); }
inline Vector<float> load_half(const E4M3* p) { return numbers_of<E4M3>(load_half_codes(p)); }
inline Vector<float> load_half(const Int4Pair* p) { return numbers_of<Int4Pair>(load_half_codes(p)); }
#endif

// A product that no compiler fuses with an addition that follows.
inline Vector<float> multiply_alone(Vector<float> a, Vector<float> b) {
  Vector<float> product = a * b;
#if defined(__FMA__)
  asm("" : "+v"(product));
#elif defined(__aarch64__) && LORS_VECTOR_BYTES == 16
  asm("" : "+w"(product));
#endif
  return product;
}

// The scales and zero points of a tile of rows, from its first row and column on. Vectors never straddle two groups, and a tile
// begins at a multiple of its columns, which with the groups' divide one another. Values have none.
template <typename W>
struct TileGrid {
  TileGrid(const lors::cpu::GridSteps&, int64_t, int64_t) {}
  template <typename V>
  V weights(int, int, V values) const {
    return values;
  }
};
template <typename W>
  requires kIsCode<W>
struct TileGrid<W> {
  const float *scales, *zeros;
  int64_t groups;
  int shift;
  TileGrid(const lors::cpu::GridSteps& steps, int64_t n, int64_t k)
      : scales(steps.scales + n * steps.groups + (k >> steps.shift)),
        zeros(steps.zeros + n * steps.groups + (k >> steps.shift)),
        groups(steps.groups),
        shift(steps.shift) {}
  // Vector u of row i.
  Vector<float> weights(int i, int u, Vector<float> codes) const {
    const int64_t at = i * groups + (int64_t(u * kLanes<float>) >> shift);
    return multiply_alone(codes - splat(zeros[at]), splat(scales[at]));
  }
};
#if defined(LORS_LOOKS_UP_INT4)
// The sixteen weights that a group's codes can be are one vector, made where a row of the tile enters the group.
template <>
struct TileGrid<Int4Pair> {
  const float *scales, *zeros;
  int64_t groups, columns;  // of a row, of a group less one
  int shift;
  mutable Vector<float> weight_of_code{};
  TileGrid(const lors::cpu::GridSteps& steps, int64_t n, int64_t k)
      : scales(steps.scales + n * steps.groups + (k >> steps.shift)),
        zeros(steps.zeros + n * steps.groups + (k >> steps.shift)),
        groups(steps.groups),
        columns((int64_t{1} << steps.shift) - 1),
        shift(steps.shift) {}
  Vector<float> weights(int i, int u, Vector<float> codes) const {
    if (u == 0 || (u * kLanes<float> & columns) == 0) {
      const Vector<float> numbers = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
      const int64_t at = i * groups + (int64_t(u * kLanes<float>) >> shift);
      weight_of_code = multiply_alone(numbers - splat(zeros[at]), splat(scales[at]));
    }
    return _mm512_maskz_permutexvar_ps(0xffff, _mm512_castps_si512(codes), weight_of_code);
  }
};
#endif

inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif LORS_VECTOR_BYTES == 32 && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// The requantised value of row n of the steps, of which `dither_row` is the number in the whole weight.
class Requantize {
 public:
  Requantize(const lors::cpu::GridSteps& steps, int64_t n)
      : steps_(steps), row_(n * steps.groups), dither_(lors::random_row(uint64_t(steps.dither_seed), steps.first_row + n)) {}

  // Of the vector at column k.
  Vector<float> operator()(Vector<float> v, int64_t k) {
    if (const int64_t at = row_ + (k >> steps_.shift); at != at_) enter(at);
    // What is not finite stays visible: v - v is 0, or else NaN.
    return multiply_alone(steps_.grid == lors::Grid::e4m3 ? round_to_e4m3(multiply_alone(v, inverse_)) : round_to_integer(v, k),
                          step_) +
           (v - v);
  }

 private:
  void enter(int64_t group) {
    at_ = group;
    const float steps = float(steps_.requantize_steps), step = steps_.scales[group] * steps;
    step_ = splat(step);
    inverse_ = splat(1.0f / step);
    const float zero = steps_.zeros[group] / steps;
    const bool is_int4 = steps_.grid == lors::Grid::int4 || steps_.requantize_steps == 16;
    least_ = splat((is_int4 ? -8.0f : -128.0f) - zero);
    most_ = splat((is_int4 ? 7.0f : 127.0f) - zero);
  }
  // Less the zero point. To clamp before rounding is the same, for the limits are integers; to add and subtract 1.5 2^23 rounds
  // to the nearest even integer, and leaves no -0.
  Vector<float> round_to_integer(Vector<float> v, int64_t k) const {
    Vector<float> x = multiply_alone(v, inverse_);
    if (steps_.dither_seed >= 0) {
      VectorOf<float>::bits column;
      for (int i = 0; i < kLanes<float>; ++i) column[i] = uint32_t(i);
      const auto word = Keep<float>(lors::random_dither(dither_, column + uint32_t(k)));
      x = multiply_add(v, inverse_, __builtin_convertvector(word, Vector<float>) * lors::kDitherUnit);
    }
    const Vector<float> magic = splat(0x1.8p23f);
    return clamp(x, least_, most_) + magic - magic;
  }
  // To three bits after the leading one, and to multiples of 2^-9: the same trick, with 1.5 2^20 times the power of 2 below x.
  static Vector<float> round_to_e4m3(Vector<float> x) {
    x = clamp(x, splat(-448.0f), splat(448.0f));
    using Words = VectorOf<float>::bits;
    const Words exponent = load_raw<Words>(&x) & 0x7f800000u, lowest = Words{} + (121u << 23);
    const Words bits = ((exponent > lowest ? exponent : lowest) + (20u << 23)) | 0x400000u;
    const auto magic = load_raw<Vector<float>>(&bits);
    return x + magic - magic;
  }
  static Vector<float> clamp(Vector<float> x, Vector<float> least, Vector<float> most) {
    x = x < least ? least : x;
    return x > most ? most : x;
  }

  const lors::cpu::GridSteps& steps_;
  int64_t row_, at_ = -1;  // the row's first group, and the one that the next four belong to
  Vector<float> step_{}, inverse_{}, least_{}, most_{};
  lors::RandomRow dither_;
};

}  // namespace
