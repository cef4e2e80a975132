// SPDX-License-Identifier: Apache-2.0
// pack: a small matrix of any dtype and strides to a zero-padded Acc matrix; store: Acc to any dtype with one rounding,
// optionally transposed. Not vectorised: they touch (N + K) r elements only.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

template <typename Acc>
void pack_as(const lors::cpu::PackJob& job, int64_t begin, int64_t end) {
  with_type(job.src_dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const T* src = static_cast<const T*>(job.src) + i * job.row_stride;
      Acc* dst = static_cast<Acc*>(job.dst) + i * job.width;
      for (int64_t j = 0; j < job.columns; ++j) dst[j] = Acc(job.scale) * to_acc<Acc>(src[j * job.column_stride]);
      for (int64_t j = job.columns; j < job.width; ++j) dst[j] = Acc(0);
    }
  });
}

// By blocks of rows, so that a transposed src is read by cache lines.
void pack_pairs(const lors::cpu::PackJob& job, int64_t begin, int64_t end) {
  constexpr int64_t block = 32;
  const auto* src = static_cast<const uint16_t*>(job.src);
  auto* dst = static_cast<uint32_t*>(job.dst);
  const auto place = [&](int64_t i, int64_t j) {
    const uint16_t* pair = src + i * job.row_stride + j * job.column_stride;
    dst[i * job.width + j] = pair[0] | uint32_t(pair[job.pair_stride]) << 16;
  };
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = end - first < block ? end : first + block;
    if (job.row_stride < job.column_stride) {
      for (int64_t j = 0; j < job.columns; ++j)
        for (int64_t i = first; i < last; ++i) place(i, j);
    } else {
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < job.columns; ++j) place(i, j);
    }
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = job.columns; j < job.width; ++j) dst[i * job.width + j] = 0;
  }
}

void pack(const lors::cpu::PackJob& job, int64_t begin, int64_t end) {
  if (job.pair_stride) return pack_pairs(job, begin, end);
  job.is_double ? pack_as<double>(job, begin, end) : pack_as<float>(job, begin, end);
}

template <typename Acc>
void store_as(const lors::cpu::StoreJob& job, int64_t begin, int64_t end) {
  with_type(job.dst_dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t row_stride = job.transpose ? 1 : job.columns, column_stride = job.transpose ? job.rows : 1;
    for (int64_t i = begin; i < end; ++i) {
      const Acc* src = static_cast<const Acc*>(job.src) + i * job.width;
      T* dst = static_cast<T*>(job.dst) + i * row_stride;
      for (int64_t j = 0; j < job.columns; ++j) dst[j * column_stride] = from_acc<T>(Acc(job.scale) * src[j]);
    }
  });
}

void store_out(const lors::cpu::StoreJob& job, int64_t begin, int64_t end) {
  job.is_double ? store_as<double>(job, begin, end) : store_as<float>(job, begin, end);
}

}  // namespace
