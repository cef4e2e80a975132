// SPDX-License-Identifier: Apache-2.0
// w = (q - z) s     q' = clamp(rint(fma(v, inv, u)) + z', lo, hi) or e4m3(v inv)     merged = (q' - z') (steps s)
// The arithmetic of quantised codes (lors/quantization.h), for every Source of the merge. Each rounding is written out, so that
// neither the compiler nor the architecture changes a bit.
#pragma once

#include <lors/quantization.h>
#include <lors/random.h>

#include "operands.cuh"

namespace lors::cuda {

// 2^23. With a whole number below it as its last 23 bits, it becomes the float32 2^23 + that number.
inline constexpr float kCodeBase = 8388608.f;
inline constexpr uint32_t kCodeBaseBits = 0x4b000000u;

// The number that a code stands for, before the zero point and the scale. `code`: its byte, or of int4 its nibble. Half of the
// codes' count is added to integers, so that none is negative, and subtracted again.
__device__ __forceinline__ float code_value(Grid grid, uint32_t code) {
  if (grid == Grid::e4m3) return ptx::e4m3_values(code).x;
  const uint32_t half = grid == Grid::int4 ? 8 : 128;
  return __uint_as_float(kCodeBaseBits | (code ^ half)) - (kCodeBase + static_cast<float>(half));
}

// Element `i` of an array whose dtype is known at run time only.
__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return ptx::load_global(static_cast<const float*>(data) + i);
  const uint16_t bits = ptx::load_global(static_cast<const uint16_t*>(data) + i);
  return dtype == DType::bfloat16 ? to_float(__ushort_as_bfloat16(bits)) : to_float(__ushort_as_half(bits));
}

// The scale and the zero point of a group of columns.
struct CodeGroup {
  float scale, zero;

  // Group `i` of the weight's [N, K / group].
  static __device__ __forceinline__ CodeGroup load(const Quantization& q, int64_t i) {
    return {load_element(q.scales, q.scales_dtype, i),
            q.zero_points ? static_cast<float>(ptx::load_global(q.zero_points + i)) : 0.f};
  }
};

// The grid on which the merged values of a group are put.
struct Requantized {
  float step, inverse;  // steps s, and 1 / (steps s)
  float low, high;      // what q' - z' can be
  bool e4m3;

  // `zero` and `inverse`: what zero_of and inverse_of return.
  __device__ __forceinline__ Requantized(const Quantization& q, float scale, float zero, float inverse_, bool e4m3_)
      : step(scale * static_cast<float>(q.requantize_steps)), inverse(inverse_), e4m3(e4m3_) {
    const float half = q.grid == Grid::int4 || q.requantize_steps == 16 ? 8.f : 128.f;
    low = e4m3 ? -448.f : -half - zero;
    high = e4m3 ? 448.f : half - 1.f - zero;
  }
  static __device__ __forceinline__ float inverse_of(const Quantization& q, float scale) {
    return 1.f / (scale * static_cast<float>(q.requantize_steps));
  }
  // z' of z. Exact: where steps are 16, z is a multiple of 16.
  static __device__ __forceinline__ float zero_of(const Quantization& q, float zero) {
    return zero / static_cast<float>(q.requantize_steps);
  }
  // The value on the grid; NaN where it is not finite; never -0. u: the dither. Clamping comes first, which is the same, as
  // both ends are on the grid. Rounding to nearest even is adding and subtracting 1.5 2^23, whose last bit counts 1; of e4m3,
  // which keeps three bits behind the first, 1.5 2^20 times the value's power of 2, or times 2^-6 for the smaller values.
  __device__ __forceinline__ float operator()(float value, float u) const {
    const float at = fminf(fmaxf(__fmaf_rn(value, inverse, u), low), high);
    uint32_t large = 0x4b400000u;
    if (e4m3) {
      const uint32_t power = __float_as_uint(at) & 0x7f800000u;
      large = (power > 121u << 23 ? power : 121u << 23) + (20u << 23) + 0x400000u;
    }
    const float rounded = __fsub_rn(__fadd_rn(at, __uint_as_float(large)), __uint_as_float(large));
    return __fmaf_rn(rounded, step, __fsub_rn(value, value));
  }
};

// The dither u of column k. row: random_row(dither_seed, first_row + n).
__device__ __forceinline__ float dither(const RandomRow& row, uint32_t column) {
  return __fmul_rn(static_cast<float>(static_cast<int>(random_dither(row, column))), kDitherUnit);
}

}  // namespace lors::cuda
