// SPDX-License-Identifier: Apache-2.0
// Random numbers that belong to a place: 32 bits for every entry of a weight, a hash of a seed, its row n and its column k.
// Whoever needs them computes them again, so nothing is stored, and every backend, layout, thread and process has the same.
//   key(seed, n)       = mix64(mix64(seed + g) + n g)    g = 0x9e3779b97f4a7c15; once per row
//   word(key, k)       = a 32-bit mix of k, into which the two halves of the key enter at its start and in its middle
//   normal(key, k)     = (the eight bytes of word and mix32(word + 0x9e3779b9), summed, - 1020) / 209.02
//   round(x, key, k)   = of the two neighbours of x in a 16-bit type the one away from zero, if the bits that the type drops
//                        are more than word / 2^32 of its step: the mean of many draws is x
// mix64 is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), mix32 is
// Wellons' "lowbias32". All of it is integer arithmetic, but for one exact product: lors_cuda/reference.py has the same bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORS_HOST_DEVICE __host__ __device__
#else
#define LORS_HOST_DEVICE
#endif

namespace lors {

// What the merge draws: nothing, or one or both.
struct Draws {
  bool rounds = false;  // a 16-bit result is rounded by chance (round_by_chance), not to nearest
  uint64_t rounding_seed = 0;
  const float* noise = nullptr;  // [N] float32: the standard deviation of what is added to each row's kept entries; null: none
  uint64_t noise_seed = 0;
};

struct RandomRow {
  uint32_t low = 0, high = 0;
};

LORS_HOST_DEVICE constexpr uint64_t mix64(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

LORS_HOST_DEVICE constexpr RandomRow random_row(uint64_t seed, int64_t row) {
  constexpr uint64_t golden = 0x9e3779b97f4a7c15;
  const uint64_t key = mix64(mix64(seed + golden) + static_cast<uint64_t>(row) * golden);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// A Word is a uint32_t, or a vector of them for as many columns.
template <typename Word>
LORS_HOST_DEVICE inline Word random_word(RandomRow row, Word column) {
  Word h = column ^ row.low;
  h = (h ^ h >> 16) * 0x7feb352du;
  h = h ^ row.high;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// 209.02 times a number whose distribution is close to the standard normal one: whole, from -1020 to 1020, as two's complement.
template <typename Word>
LORS_HOST_DEVICE inline Word random_normal(RandomRow row, Word column) {
  const Word first = random_word(row, column);
  const Word second = random_word(RandomRow{}, first + 0x9e3779b9u);
  const Word pairs = (first & 0x00ff00ffu) + (first >> 8 & 0x00ff00ffu) + (second & 0x00ff00ffu) + (second >> 8 & 0x00ff00ffu);
  return (pairs & 0xffffu) + (pairs >> 16) - 1020u;
}

// A whole number from -2^23 to 2^23 - 1, as two's complement: the upper 24 bits of the word. Times kDitherUnit, rounded once to
// float32, it is the dither of quantization.h, at most 0.499.
template <typename Word>
LORS_HOST_DEVICE inline Word random_dither(RandomRow row, Word column) {
  return (random_word(row, column) >> 8) - 0x800000u;
}
inline constexpr float kDitherUnit = 0.998f * 0x1p-24f;

// What random_normal is multiplied by for noise of this standard deviation, given as a float32's bits after its product with
// kNormalUnit: of 14 significant bits, so that the product is exact, and the sum the same with or without fused multiply-add.
inline constexpr float kNormalUnit = 0.0047841962f;  // 1 / sqrt(8 (256^2 - 1) / 12)
LORS_HOST_DEVICE constexpr uint32_t short_factor(uint32_t bits) { return bits & 0xfffffc00u; }

// The bits of a float32 rounded by chance to bfloat16 or, `to_float16`, float16, as a float32's. What lies beyond the type's
// largest number, an infinity or a NaN comes back as it is, for rounding to nearest.
template <typename Word>
LORS_HOST_DEVICE inline Word round_by_chance(Word bits, Word random, bool to_float16) {
  const Word magnitude = bits & 0x7fffffffu, zero = bits ^ bits;
  if (!to_float16) {
    const Word up = (bits << 16) > random ? zero + 0x10000u : zero;
    return magnitude > 0x7f7f0000u ? bits : (bits & 0xffff0000u) + up;
  }
  // float16 keeps 10 of 23 bits, and below 2^-14 one less for each power of 2: its step there is 2^-24.
  const Word exponent = magnitude >> 23;
  const Word dropped = exponent > 112u ? zero + 13u : 126u - exponent;
  const Word significand = (magnitude & 0x7fffffu) | (exponent > 0u ? zero + 0x800000u : zero);
  const Word beyond = dropped > 32u ? dropped - 32u : zero;
  const Word fraction = significand << (dropped < 32u ? 32u - dropped : zero) >> (beyond < 31u ? beyond : zero + 31u);
  const Word step = (zero + 1u) << (dropped < 24u ? dropped : zero);
  const Word below = dropped < 24u ? magnitude & ~(step - 1u) : zero;  // what is at least one step only loses its last bits
  const Word up = fraction > random ? (dropped < 24u ? step : zero + 0x33800000u) : zero;  // 2^-24
  return magnitude > 0x477fe000u ? bits : (bits ^ magnitude) | (below + up);
}

}  // namespace lors
