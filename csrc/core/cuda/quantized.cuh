// SPDX-License-Identifier: Apache-2.0
// The codes of a quantised weight as float32, and its merged values on their grid again; the formulas are
// lors/quantization.h's:
//   w = (q - z) s     q' = clamp(rint(fma(v, inv, u)) + z', lo, hi) or e4m3(v inv)     merged = (q' - z') (steps s)
// Every operation is written out, none is left to the compiler's choice, and nothing depends on the architecture: every path
// has the same bits.
#pragma once

#include <lors/quantization.h>
#include <lors/random.h>

#include "operands.cuh"

namespace lors::cuda {

// A code, or a nibble for int4, without its zero point. Integers through the significand of 2^23.
__device__ __forceinline__ float code_value(Grid grid, uint32_t code) {
  if (grid == Grid::e4m3) return ptx::e4m3_values(code).x;
  const uint32_t half = grid == Grid::int4 ? 8 : 128;
  return __uint_as_float(0x4b000000u | (code ^ half)) - (8388608.f + static_cast<float>(half));
}

// Element `i` of an array whose dtype is known at run time only.
__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return ptx::load_global(static_cast<const float*>(data) + i);
  const uint16_t bits = ptx::load_global(static_cast<const uint16_t*>(data) + i);
  return dtype == DType::bfloat16 ? to_float(__ushort_as_bfloat16(bits)) : to_float(__ushort_as_half(bits));
}

// What the columns of a group share.
struct CodeGroup {
  float scale, zero;

  // Number `i` of [N, K / group].
  static __device__ __forceinline__ CodeGroup load(const Quantization& q, int64_t i) {
    return {load_element(q.scales, q.scales_dtype, i),
            q.zero_points ? static_cast<float>(ptx::load_global(q.zero_points + i)) : 0.f};
  }
};

// Onto the grid of a group. What is not finite becomes NaN.
struct Requantized {
  float step, inverse, low, high;  // codes without their zero point are in [low, high]
  bool e4m3;

  // `zero`: of the result; `inverse`: inverse_of(q, scale).
  __device__ __forceinline__ Requantized(const Quantization& q, float scale, float zero, float inverse_, bool e4m3_)
      : step(scale * static_cast<float>(q.requantize_steps)), inverse(inverse_), e4m3(e4m3_) {
    const float half = q.grid == Grid::int4 || q.requantize_steps == 16 ? 8.f : 128.f;
    low = e4m3 ? -448.f : -half - zero;
    high = e4m3 ? 448.f : half - 1.f - zero;
  }
  static __device__ __forceinline__ float inverse_of(const Quantization& q, float scale) {
    return 1.f / (scale * static_cast<float>(q.requantize_steps));
  }
  // Of a stored one: exact, a multiple of 16 where steps are 16.
  static __device__ __forceinline__ float zero_of(const Quantization& q, float zero) {
    return zero / static_cast<float>(q.requantize_steps);
  }
  // u: the dither. Clamped first, for the ends are on the grid; then rounded to nearest even where the significand of 1.5 2^23
  // ends, or, of e4m3, of 1.5 2^20 times the value's power of 2, which is at least 2^-6. There is no -0.
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

// Of random_row(dither_seed, first_row + n), and of a column.
__device__ __forceinline__ float dither(const RandomRow& row, uint32_t column) {
  return __fmul_rn(static_cast<float>(static_cast<int>(random_dither(row, column))), kDitherUnit);
}

}  // namespace lors::cuda
