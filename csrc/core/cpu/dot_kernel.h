// SPDX-License-Identifier: Apache-2.0
// out[t, n] = sum_k activation[t, k] merged[n, k] + bias[n] for a few tokens: each merged tile is multiplied while it is in
// registers. Reads the weight once, as it is stored, and writes nothing of its size. Without an adapter: stored_dot_kernel.h.
#pragma once

#include "merge_kernel.h"
#include "pack_kernel.h"
#include "stored_dot_kernel.h"

namespace {

static_assert(lors::cpu::kDotColumns % kMergePanel<float> == 0);

// Adds the tile's rows, each value rounded to Round, times every token's activations to `sums`, a vector per row and token.
template <typename Round>
struct DotSink {
  using Element = void;
  const float* activation;  // of the tile's first column
  int64_t stride, tokens;   // of and in `activation`
  float* sums;              // of the tile's first row: [rows, tokens, lanes]

  DotSink row(int i) const { return {activation, stride, tokens, sums + i * tokens * kLanes<float>}; }

  template <typename Acc, int Vectors, typename Source>
  [[gnu::always_inline]] void store_row(const Source&, int i, const Vector<Acc> (&row)[Vectors]) const {
    Vector<float> merged[Vectors];
#pragma GCC unroll 4
    for (int u = 0; u < Vectors; ++u) store<float, Round, float>(reinterpret_cast<float*>(merged + u), row[u]);
    float* sum = sums + i * tokens * kLanes<float>;
    const float* x = activation;
    for (int64_t t = 0; t < tokens; ++t, x += stride, sum += kLanes<float>) {
      Vector<float> s = load_raw<Vector<float>>(sum);
#pragma GCC unroll 4
      for (int u = 0; u < Vectors; ++u) s += merged[u] * load_raw<Vector<float>>(x + u * kLanes<float>);
      store_raw(sum, s);
    }
  }
};

template <template <typename, typename, int> typename Source, typename W, typename Round>
void dot_rows(const lors::cpu::DotJob& job, int64_t begin, int64_t end, float* sums) {
  const int64_t width = job.tokens * kLanes<float>;
  const auto* activation = static_cast<const float*>(job.activation);
  std::memset(sums, 0, size_t((end - begin) * width) * sizeof(float));
  for_each_tile<float>(job.weight, begin, end, [&](auto rows, int64_t n, int64_t k, const float* a, const float* b) {
    merge_at<float, decltype(rows)::value, kMergeVectors, Source, W>(
        job.weight, n, k, a, b, DotSink<Round>{activation + k, job.stride, job.tokens, sums + (n - begin) * width});
  });
  for (int64_t n = begin; n < end; ++n)
    for (int64_t t = 0; t < job.tokens; ++t, sums += kLanes<float>) {
      float sum = job.bias ? job.bias[n] : 0.0f;
      for (int i = 0; i < kLanes<float>; ++i) sum += sums[i];
      job.out[t * job.out_features + n] = sum;
    }
}

struct DotRowsOf {
  template <template <typename, typename, int> typename Source, typename W, typename Round>
  auto operator()() const {
    return dot_rows<Source, W, Round>;
  }
};

void pack_dot(const lors::cpu::DotJob& job, int64_t begin, int64_t end) {
#if defined(__AVX2__)
  if (is_stored_dot(job) && job.weight.weight_dtype == lors::DType::bfloat16) return pack_stored_dot(job, begin, end);
#endif
  lors::cpu::PackJob pack_job;
  pack_job.src = job.src;
  pack_job.src_dtype = job.src_dtype;
  pack_job.columns = pack_job.row_stride = job.weight.in_features;
  pack_job.column_stride = 1;
  pack_job.width = job.stride;
  pack_job.dst = job.activation;
  pack(pack_job, begin, end);
}

void dot(const lors::cpu::DotJob& job, int64_t begin, int64_t end, float* sums) {
#if defined(__AVX2__)
  if (is_stored_dot(job)) return stored_dot_of(job)(job, begin, end);
#endif
  with_weight(job.weight, DotRowsOf{})(job, begin, end, sums);
}

}  // namespace
