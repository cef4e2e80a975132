// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set this translation unit is compiled for, and conversions to and from the four element types.
// Included by kernels.cpp only, through its headers. Everything is in an anonymous namespace: otherwise the linker could use
// one instruction set's copy of a function in the table of another.
#pragma once

#include <lors/types.h>

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Tests define LORS_VECTOR_BYTES to run the code for wide vectors on processors without the instructions.
#if !defined(LORS_VECTOR_BYTES)
#if defined(__AVX512F__)
#define LORS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LORS_VECTOR_BYTES 32
#else
#define LORS_VECTOR_BYTES 16
#endif
#endif
constexpr int kVectorBytes = LORS_VECTOR_BYTES;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t keep __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VectorOf<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
  typedef int64_t keep __attribute__((vector_size(kVectorBytes)));
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;
template <typename Acc>
using Keep = typename VectorOf<Acc>::keep;
template <typename Acc>
constexpr int kLanes = VectorOf<Acc>::lanes;

// Scalar conversions: packing, tails and the baseline.
inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(float16 x) {
  // Exponent and fraction shifted into place, then rescaled by 2^112: exact for normal and subnormal numbers.
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude *= 0x1p112f;
  uint32_t out;
  std::memcpy(&out, &magnitude, 4);
  if ((x.bits & 0x7c00) == 0x7c00) out |= 0x7f800000u;  // infinities and NaNs keep their fraction
  out |= uint32_t(x.bits & 0x8000) << 16;
  float result;
  std::memcpy(&result, &out, 4);
  return result;
}

inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};  // stays NaN
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00 | ((bits >> 13) & 0x3ff))};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {
    // Below the smallest normal: adding 0.5 makes the float adder round at float16's subnormal step, 2^-24.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return {uint16_t(sign | ((bits - 0x38000000) >> 13))};
}

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  return to_bfloat16(x);
}
template <>
inline float16 from_float<float16>(float x) {
  return to_float16(x);
}

template <typename Acc, typename T>
inline Acc to_acc(T x) {
  return Acc(to_float(x));
}
template <>
inline double to_acc<double, double>(double x) {
  return x;
}
template <>
inline float to_acc<float, double>(double x) {
  return float(x);
}
// A float64 accumulator goes to 16 bits through float32 with round-to-odd, so that the value is rounded once.
inline float round_to_odd(double x) {
  float nearest = float(x);
  if (double(nearest) == x || nearest != nearest) return nearest;
  uint32_t bits;
  std::memcpy(&bits, &nearest, 4);
  if ((double(nearest) > x) == (x > 0)) bits -= 1;  // towards zero
  bits |= 1;
  std::memcpy(&nearest, &bits, 4);
  return nearest;
}
template <typename T>
inline T from_acc(float x) {
  return from_float<T>(x);
}
template <>
inline double from_acc<double>(float x) {
  return double(x);
}
template <typename T>
inline T from_acc(double x) {
  return from_float<T>(round_to_odd(x));
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
template <>
inline float from_acc<float>(double x) {
  return float(x);
}

template <typename V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
inline void store_raw(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
// Every lane x. As a list it compiles to one broadcast load; `Vector<Acc>{} + x` must add (0 + -0.0 is +0), and a loop over the
// lanes becomes a chain of insertions.
template <typename Acc, int... I>
inline Vector<Acc> splat(Acc x, std::integer_sequence<int, I...>) {
  return Vector<Acc>{((void)I, x)...};
}
template <typename Acc>
inline Vector<Acc> splat(Acc x) {
  return splat(x, std::make_integer_sequence<int, kLanes<Acc>>{});
}

// One vector of elements of type T, as Acc.
template <typename Acc, typename T>
inline Vector<Acc> load(const T* p) {
  Vector<Acc> v;
  for (int i = 0; i < kLanes<Acc>; ++i) v[i] = to_acc<Acc>(p[i]);
  return v;
}
template <>
inline Vector<float> load<float, float>(const float* p) {
  return load_raw<Vector<float>>(p);
}
template <>
inline Vector<double> load<double, double>(const double* p) {
  return load_raw<Vector<double>>(p);
}
template <>
inline Vector<float> load<float, bfloat16>(const bfloat16* p) {
  using V = VectorOf<float>;
  const auto wide = __builtin_convertvector(load_raw<V::half>(p), V::bits) << 16;
  return load_raw<Vector<float>>(&wide);
}
// Masked with all ones, because GCC 12 warns about an undefined register in its unmasked 512-bit conversions.
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
template <>
inline Vector<float> load<float, float16>(const float16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif LORS_VECTOR_BYTES == 32 && defined(__F16C__)
template <>
inline Vector<float> load<float, float16>(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

#if defined(__F16C__)
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

// `x` rounded to bfloat16, in the upper halves of the words.
inline VectorOf<float>::bits round_to_bfloat16(Vector<float> x) {
  using V = VectorOf<float>;
  const auto bits = load_raw<V::bits>(&x);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  const V::keep is_nan = x != x;
  return is_nan ? ((bits | 0x400000u) & 0xffff0000u) : rounded;
}

#if LORS_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
// The instruction that rounds to bfloat16, unless a number is so small that it would make it 0.
inline bool rounds_to_bfloat16(Vector<float> x, __m256i* out) {
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, subnormal) != 0, 0)) return false;
  *out = (__m256i)_mm512_cvtneps_pbh(x);
  return true;
}
#endif

// Stores one vector of Acc as elements of type Out, each value rounded once to type Round.
template <typename Out, typename Round, typename Acc>
inline void store(Out* p, Vector<Acc> v) {
  for (int i = 0; i < kLanes<Acc>; ++i) p[i] = from_acc<Out>(to_acc<Acc>(from_acc<Round>(v[i])));
}
template <>
inline void store<float, float, float>(float* p, Vector<float> v) {
  store_raw(p, v);
}
template <>
inline void store<double, double, double>(double* p, Vector<double> v) {
  store_raw(p, v);
}
template <>
inline void store<float, bfloat16, float>(float* p, Vector<float> v) {
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  __m256i halves;
  if (rounds_to_bfloat16(v, &halves))
    return store_raw(p, _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16));
#endif
  store_raw(p, round_to_bfloat16(v));
}
template <>
inline void store<bfloat16, bfloat16, float>(bfloat16* p, Vector<float> v) {
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  __m256i halves;
  if (rounds_to_bfloat16(v, &halves)) return store_raw(p, halves);
#endif
  store_raw(p, __builtin_convertvector(round_to_bfloat16(v) >> 16, VectorOf<float>::half));
}
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
template <>
inline void store<float16, float16, float>(float16* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, kToNearest));
}
template <>
inline void store<float, float16, float>(float* p, Vector<float> v) {
  store_raw(p, _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtps_ph(0xffff, v, kToNearest)));
}
#elif LORS_VECTOR_BYTES == 32 && defined(__F16C__)
template <>
inline void store<float16, float16, float>(float16* p, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, kToNearest));
}
template <>
inline void store<float, float16, float>(float* p, Vector<float> v) {
  store_raw(p, _mm256_cvtph_ps(_mm256_cvtps_ph(v, kToNearest)));
}
#endif

// store() with non-temporal stores where the target has them: for results larger than the caches, whose lines would otherwise
// be read before they are overwritten. p is aligned to the vector. The thread must call streaming_done() before it returns,
// because ordinary synchronisation does not order these stores.
template <typename Out, typename Round, typename Acc>
inline void store_streaming(Out* p, Vector<Acc> v) {
#if LORS_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(Out) == 4 && sizeof(Round) == 4 && sizeof(Acc) == 4) return _mm512_stream_ps(p, v);
#elif LORS_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(Out) == 4 && sizeof(Round) == 4 && sizeof(Acc) == 4) return _mm256_stream_ps(p, v);
#endif
  store<Out, Round, Acc>(p, v);
}
inline void streaming_done() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls f(T{}) with the element type that `dtype` names.
template <typename F>
inline void with_type(lors::DType dtype, F f) {
  switch (dtype) {
    case lors::DType::float64: return f(double{});
    case lors::DType::float32: return f(float{});
    case lors::DType::bfloat16: return f(bfloat16{});
    case lors::DType::float16: return f(float16{});
  }
}

}  // namespace
