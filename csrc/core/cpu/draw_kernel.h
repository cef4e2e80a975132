// SPDX-License-Identifier: Apache-2.0
// out[n, k] = round(merged[n, k] + kept[n, k] noise[n] normal(n, k)), to nearest or by chance: the merge's random numbers
// (lors/random.h), over rows that it has just written in the accumulation type and that are still in a cache.
// A pass of its own, so that the tiles of the merge stay what they are without it.
#pragma once

#include <lors/random.h>

#include "expand.h"
#include "kernels.h"

namespace {

inline float noise_factor(float deviation) {
  const float factor = deviation * lors::kNormalUnit;
  uint32_t bits;
  std::memcpy(&bits, &factor, 4);
  bits = lors::short_factor(bits);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename Out, typename Round>
void draw_rows(const lors::cpu::DrawJob& job) {
  using Words = VectorOf<float>::bits;
  constexpr int lanes = kLanes<float>;
  const int64_t K = job.in_features, words = lors::mask_words(K);
  const lors::Draws& draws = job.draws;
  const bool rounds = draws.rounds && sizeof(Round) == 2;
  Words lane;
  for (int i = 0; i < lanes; ++i) lane[i] = uint32_t(i);
  for (int64_t i = 0; i < job.rows; ++i) {
    const int64_t n = job.first_row + i;
    const lors::RandomRow rounding = lors::random_row(draws.rounding_seed, n), noise = lors::random_row(draws.noise_seed, n);
    const float factor = draws.noise ? noise_factor(draws.noise[n]) : 0.0f;
    const uint32_t* kept = job.kept ? job.kept + i * words : nullptr;
    const float* src = static_cast<const float*>(job.src) + i * K;
    Out* dst = static_cast<Out*>(job.dst) + i * K;
    const auto draw_at = [&](const float* from, Out* to, int64_t k) {
      const Words column = lane + uint32_t(k);
      Vector<float> v = load_raw<Vector<float>>(from);
      if (kept) {
        const auto normal = __builtin_convertvector((Keep<float>)lors::random_normal(noise, column), Vector<float>);
        v = keep_bits<float>(kept[k / 32] >> (k % 32)) ? v + normal * factor : v;
      }
      if (rounds) {
        const Words bits = lors::round_by_chance((Words)v, lors::random_word(rounding, column), std::is_same_v<Round, float16>);
        v = (Vector<float>)bits;
      }
      store<Out, Round, float>(to, v);
    };
    int64_t k = 0;
    for (; k + lanes <= K; k += lanes) draw_at(src + k, dst + k, k);
    if (k < K) {
      float from[lanes] = {};
      Out to[lanes];
      std::memcpy(from, src + k, size_t(K - k) * sizeof(float));
      draw_at(from, to, k);
      std::memcpy(dst + k, to, size_t(K - k) * sizeof(Out));
    }
  }
}

// Noise alone, in place: nothing is rounded.
inline void draw_doubles(const lors::cpu::DrawJob& job) {
  const int64_t K = job.in_features, words = lors::mask_words(K);
  for (int64_t i = 0; i < job.rows && job.kept; ++i) {
    const lors::RandomRow noise = lors::random_row(job.draws.noise_seed, job.first_row + i);
    const double factor = noise_factor(job.draws.noise[job.first_row + i]);
    double* row = static_cast<double*>(job.dst) + i * K;
    for (int64_t k = 0; k < K; ++k)
      if (job.kept[i * words + k / 32] >> (k % 32) & 1) row[k] += factor * int32_t(lors::random_normal(noise, uint32_t(k)));
  }
}

void draw(const lors::cpu::DrawJob& job) {
  using lors::DType;
  if (job.dst_dtype == DType::float64) return draw_doubles(job);
  if (job.dst_dtype == DType::bfloat16) return draw_rows<bfloat16, bfloat16>(job);
  if (job.dst_dtype == DType::float16) return draw_rows<float16, float16>(job);
  if (job.round_to == DType::bfloat16) return draw_rows<float, bfloat16>(job);
  if (job.round_to == DType::float16) return draw_rows<float, float16>(job);
  return draw_rows<float, float>(job);
}

}  // namespace
