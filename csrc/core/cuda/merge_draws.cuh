// SPDX-License-Identifier: Apache-2.0
// The random numbers of the merge (lors/random.h) on the eight values that a lane is about to store: noise on what is kept, and
// of a 16-bit result the choice between two neighbours, which rounding to nearest then leaves as it is.
#pragma once

#include "merge_source.cuh"

namespace lors::cuda {

template <typename W, typename Out>
__device__ __forceinline__ void draw(const MergeProblem& p, const Lane& at, int h, int c, uint32_t kept, float (&values)[8]) {
  constexpr bool kSplit = kSplitColumns<W, Out>;
  const uint32_t first = static_cast<uint32_t>(lane_column<kSplit>(at, c));
  const auto column = [&](int i) { return first + static_cast<uint32_t>(kSplit ? i % 4 + i / 4 * 16 : i); };
  if (p.draws.noise != nullptr) {
    const RandomRow row = random_row(p.draws.noise_seed, at.n(h));
    const float deviation = ptx::load_global(p.draws.noise + at.n(h));
    const float factor = __uint_as_float(short_factor(__float_as_uint(deviation * kNormalUnit)));
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (kept >> i & 1)
        values[i] = fmaf(static_cast<float>(static_cast<int>(random_normal(row, column(i)))), factor, values[i]);
  }
  if constexpr (!std::is_same_v<Out, float>) {
    if (p.draws.rounds) {
      const RandomRow row = random_row(p.draws.rounding_seed, at.n(h));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        values[i] = __uint_as_float(
            round_by_chance(__float_as_uint(values[i]), random_word(row, column(i)), std::is_same_v<Out, float16>));
    }
  }
}

}  // namespace lors::cuda
