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

void pack(const lors::cpu::PackJob& job, int64_t begin, int64_t end) {
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
      for (int64_t j = 0; j < job.columns; ++j) dst[j * column_stride] = from_acc<T>(src[j]);
    }
  });
}

void store_out(const lors::cpu::StoreJob& job, int64_t begin, int64_t end) {
  job.is_double ? store_as<double>(job, begin, end) : store_as<float>(job, begin, end);
}

}  // namespace
