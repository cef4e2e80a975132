// SPDX-License-Identifier: Apache-2.0
// out[n, k] = round(merged[n, k] + kept[n, k] noise[n] normal(n, k)), to nearest or by chance: the merge's random numbers
// (lors/random.h); or round(requantised(merged[n, k])) (lors/quantization.h), for which +0 stays +0, so that no mask is read.
// Over rows that the merge has just written in the accumulation type and that are still in a cache.
// A pass of its own, so that the tiles of the merge stay what they are without it.
#pragma once

#include <lors/random.h>

#include "contract_kernel.h"
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

// Columns whose noise is made at a time: a multiple of 32 and of the lanes.
constexpr int kDrawColumns = 256;

// The noise of columns [k, k + columns) of row i of the job, with 0 where nothing is kept; beyond them anything.
inline void noise_of(const lors::cpu::DrawJob& job, int64_t i, int64_t k, int64_t columns, float (&noise)[kDrawColumns]) {
  using Words = VectorOf<float>::bits;
  constexpr int lanes = kLanes<float>;
  const lors::RandomRow row = lors::random_row(job.draws.noise_seed, job.first_row + i);
  const float factor = noise_factor(job.draws.noise[job.first_row + i]);
  const uint32_t* kept = job.kept ? job.kept + (i * lors::mask_words(job.in_features) + k / 32) : nullptr;
  Words column;
  for (int j = 0; j < lanes; ++j) column[j] = uint32_t(k + j);
  for (int j = 0; j < columns; j += lanes, column += uint32_t(lanes)) {
    const auto normal = __builtin_convertvector((Keep<float>)lors::random_normal(row, column), Vector<float>);
    store_raw(noise + j, kept ? where_bits<float>(kept[j / 32] >> (j % 32), normal * factor) : normal * factor);
  }
  const int64_t offset = i * job.in_features + k;
  if (!kept && job.kept_where_size == 2) zero_where_zero<uint16_t>(noise, job.kept_where, offset, columns);
  if (!kept && job.kept_where_size == 4) zero_where_zero<uint32_t>(noise, job.kept_where, offset, columns);
  if (!kept && job.kept_where_size == 8) zero_where_zero<uint64_t>(noise, job.kept_where, offset, columns);
}

template <typename Out, typename Round>
void draw_rows(const lors::cpu::DrawJob& job) {
  using Words = VectorOf<float>::bits;
  constexpr int lanes = kLanes<float>;
  const int64_t K = job.in_features;
  const lors::Draws& draws = job.draws;
  const bool rounds = draws.rounds && sizeof(Round) == 2;
  Words lane;
  for (int j = 0; j < lanes; ++j) lane[j] = uint32_t(j);
  alignas(64) float noise[kDrawColumns];
  for (int64_t i = 0; i < job.rows; ++i) {
    const lors::RandomRow row = lors::random_row(draws.rounding_seed, job.first_row + i);
    Requantize requantized(job.steps, job.first_row + i);
    const float* src = static_cast<const float*>(job.src) + i * K;
    Out* dst = static_cast<Out*>(job.dst) + i * K;
    for (int64_t first = 0; first < K; first += kDrawColumns) {
      const int64_t columns = K - first < kDrawColumns ? K - first : kDrawColumns;
      if (draws.noise) noise_of(job, i, first, columns, noise);
      const auto draw_at = [&](const float* from, Out* to, int64_t j) {
        Vector<float> v = load_raw<Vector<float>>(from);
        if (draws.noise) v += load_raw<Vector<float>>(noise + j);
        if (job.steps.requantize_steps) v = requantized(v, first + j);
        if (rounds) {
          const Words random = lors::random_word(row, lane + uint32_t(first + j));
          v = (Vector<float>)lors::round_by_chance((Words)v, random, std::is_same_v<Round, float16>);
        }
        store<Out, Round, float>(to, v);
      };
      int64_t j = 0;
      for (; j + lanes <= columns; j += lanes) draw_at(src + first + j, dst + first + j, j);
      if (j < columns) {
        float from[lanes] = {};
        Out to[lanes];
        std::memcpy(from, src + first + j, size_t(columns - j) * sizeof(float));
        draw_at(from, to, j);
        std::memcpy(dst + first + j, to, size_t(columns - j) * sizeof(Out));
      }
    }
  }
}

// Noise alone, in place: nothing is rounded.
inline void draw_doubles(const lors::cpu::DrawJob& job) {
  if (!job.draws.noise) return;
  float noise[kDrawColumns];
  for (int64_t i = 0; i < job.rows; ++i) {
    double* row = static_cast<double*>(job.dst) + i * job.in_features;
    for (int64_t first = 0; first < job.in_features; first += kDrawColumns) {
      const int64_t columns = job.in_features - first < kDrawColumns ? job.in_features - first : kDrawColumns;
      noise_of(job, i, first, columns, noise);
      for (int64_t j = 0; j < columns; ++j) row[first + j] += double(noise[j]);
    }
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
