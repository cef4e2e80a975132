// SPDX-License-Identifier: Apache-2.0
// Values of any dtype as bfloat16 operands of tensor-core matmuls with float32 accuracy. A value is the exact sum of its bf16
// split terms (bfloat16: 1, float16: 2, float32: 3), and a b = sum of a_i b_j with i + j < 3; the rest is below 2^-24 |a b|.
// Loads and stores of 16 bytes, at any alignment. For every kernel family.
#pragma once

#include <lors/types.h>

#include "ptx.h"

namespace lors::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kMaxTerms = 3;
constexpr int kWarp = 32;

__host__ __device__ constexpr int split_terms(DType dtype) {
  return dtype == DType::bfloat16 ? 1 : dtype == DType::float16 ? 2 : 3;
}

template <typename T>
__host__ __device__ constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, bfloat16>) return DType::bfloat16;
  if constexpr (std::is_same_v<T, float16>) return DType::float16;
  return DType::float32;
}

// A row-major matrix whose dtype is known at run time only: the adapters and the bias, small enough that a branch per load
// costs less than kernels for every combination of dtypes.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  DType dtype = DType::float32;
  bool vectors = false;  // every eighth element of every row starts a 16-byte aligned address
};

// Whether rows of `columns` elements at `data` can be read and written 16 bytes at a time.
inline bool has_vectors(const void* data, int64_t columns) {
  return columns % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline Matrix matrix(const void* data, DType dtype, int64_t rows, int64_t columns) {
  return {data, rows, columns, dtype, has_vectors(data, columns)};
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __float2half_rn(x);
  else
    return x;
}

__device__ __forceinline__ uint32_t bits_of(bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(float16 x) { return __half_as_ushort(x); }

// Two 16-bit elements in a register, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pair(T low, T high) {
  return bits_of(low) | bits_of(high) << 16;
}

// The same of two float32, each rounded to nearest: one instruction.
template <typename T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return pair(v.x, v.y);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return pair(v.x, v.y);
  }
}

// Eight consecutive elements as they lie in memory: one 16-byte vector, or two for float32.
template <typename T>
struct Eight {
  static constexpr int kVectors = sizeof(T) / 2;
  uint4 vector[kVectors];

  __device__ __forceinline__ void get(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (std::is_same_v<T, float>)
        values[i] = __uint_as_float(word_at(i));
      else if constexpr (std::is_same_v<T, bfloat16>)
        values[i] = to_float(__ushort_as_bfloat16(static_cast<unsigned short>(word_at(i / 2) >> (16 * (i % 2)))));
      else
        values[i] = to_float(__ushort_as_half(static_cast<unsigned short>(word_at(i / 2) >> (16 * (i % 2)))));
    }
  }
  __device__ __forceinline__ void set(const float (&values)[8]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>)
          word[i] = __float_as_uint(values[4 * v + i]);
        else
          word[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
      }
      vector[v] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

 private:
  // Selects, not an array index: an index that the compiler cannot resolve would put the vector in local memory.
  __device__ __forceinline__ uint32_t word_at(int i) const {
    const uint4& v = vector[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// Elements [column, column + 8) of a row of `columns` elements; zeros beyond its end. `column` is a multiple of 8. `vectors`:
// see has_vectors. kOnce: bypass the L1 cache, nothing reads these bytes again soon.
template <typename T, bool kOnce = false>
__device__ __forceinline__ Eight<T> load_eight(const T* row, int64_t column, int64_t columns, bool vectors) {
  Eight<T> eight{};
  if (vectors) {
    if (column < columns) {
#pragma unroll
      for (int v = 0; v < Eight<T>::kVectors; ++v) {
        const uint4* p = reinterpret_cast<const uint4*>(row + column) + v;
        if constexpr (kOnce)
          eight.vector[v] = ptx::load_global_once(p);
        else
          eight.vector[v] = ptx::load_global(p);
      }
    }
    return eight;
  }
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = column + i < columns ? to_float(ptx::load_global(row + column + i)) : 0.f;
  eight.set(values);  // exact: the values are T's own
  return eight;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* row, int64_t column, int64_t columns, bool vectors, const Eight<T>& eight) {
  if (vectors) {
    if (column < columns) {
#pragma unroll
      for (int v = 0; v < Eight<T>::kVectors; ++v)
        ptx::store_global(reinterpret_cast<uint4*>(row + column) + v, eight.vector[v]);
    }
    return;
  }
  float values[8];
  eight.get(values);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < columns) ptx::store_global(row + column + i, from_float<T>(values[i]));
}

// Elements [column, column + 8) of row `row` of a matrix as float32; zeros outside the matrix.
__device__ __forceinline__ void load_eight(float (&values)[8], const Matrix& m, int64_t row, int64_t column) {
  const int64_t columns = row < m.rows ? m.columns : 0;
  if (m.dtype == DType::bfloat16)
    load_eight(static_cast<const bfloat16*>(m.data) + row * m.columns, column, columns, m.vectors).get(values);
  else if (m.dtype == DType::float16)
    load_eight(static_cast<const float16*>(m.data) + row * m.columns, column, columns, m.vectors).get(values);
  else
    load_eight(static_cast<const float*>(m.data) + row * m.columns, column, columns, m.vectors).get(values);
}

// The next split terms of two neighbours, their nearest bfloat16, packed into a register; `low` and `high` keep the remainders.
__device__ __forceinline__ uint32_t next_term_pair(float& low, float& high) {
  const uint32_t terms = rounded_pair<bfloat16>(low, high);
  low -= __uint_as_float(terms << 16);
  high -= __uint_as_float(terms & 0xffff0000u);
  return terms;
}
// The same for eight.
__device__ __forceinline__ uint4 next_terms(float (&rest)[8]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = next_term_pair(rest[2 * i], rest[2 * i + 1]);
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename Z>
constexpr int kVectorElements = 16 / static_cast<int>(sizeof(Z));

// The 16-byte vector at `column` of a row of `columns` elements, element by element: for rows that are not aligned to 16
// bytes. Zeros beyond the row's end.
template <typename Z>
__device__ __forceinline__ uint4 gather_vector(const Z* row, int64_t column, int64_t columns) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kVectorElements<Z>; ++i) {
    if (column + i >= columns) continue;
    if constexpr (sizeof(Z) == 4)
      word[i] = ptx::load_global(reinterpret_cast<const uint32_t*>(row + column + i));
    else
      word[i / 2] |= uint32_t{ptx::load_global(reinterpret_cast<const uint16_t*>(row + column + i))} << (16 * (i % 2));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Splits a vector's elements and stores term i at to + i * term_size.
template <typename Z>
__device__ __forceinline__ void store_terms(uint16_t* to, int term_size, const uint4& vector) {
  if constexpr (std::is_same_v<Z, bfloat16>) {
    ptx::store_shared(reinterpret_cast<uint4*>(to), vector);
  } else if constexpr (std::is_same_v<Z, float16>) {
    const Eight<float16> eight{{vector}};
    float rest[8];
    eight.get(rest);
#pragma unroll
    for (int term = 0; term < 2; ++term) {
      const uint4 packed = next_terms(rest);
      ptx::store_shared(reinterpret_cast<uint4*>(to + term * term_size), packed);
    }
  } else {
    float rest[4] = {__uint_as_float(vector.x), __uint_as_float(vector.y), __uint_as_float(vector.z),
                     __uint_as_float(vector.w)};
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      const uint32_t low = next_term_pair(rest[0], rest[1]);
      ptx::store_shared(reinterpret_cast<uint2*>(to + term * term_size), make_uint2(low, next_term_pair(rest[2], rest[3])));
    }
  }
}

// Where the slots of a code of layout "2:4" (lors/sparse24.h) are in their group: 0 to 3, or 4 where the slot holds nothing.
__device__ __forceinline__ void slots_of(uint32_t code, uint32_t (&position)[2]) {
  const uint32_t first = code & 3, second = code >> 2 & 3;
  const bool both = first < second, one = first == second;
  position[0] = both || (one && first != 3) ? first : 4;
  position[1] = both || (one && first == 3) ? second : 4;
}
// The four columns a code keeps, as bits; nothing for a code that does not occur.
__device__ __forceinline__ uint32_t kept_by(uint32_t code) {
  uint32_t position[2];
  slots_of(code, position);
  return ((1u << position[0]) | (1u << position[1])) & 15;
}

}  // namespace lors::cuda
