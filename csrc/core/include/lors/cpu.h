// SPDX-License-Identifier: Apache-2.0
// What the CPU backend chose for this processor: kernels and matmul dtypes (csrc/core/cpu/dispatch.cpp).
#pragma once

#include <lors/types.h>

namespace lors {

// Up to this many tokens the forward multiplies each merged tile, or stored row, while it is in registers.
inline constexpr int64_t kFewTokens = 8;

// The instruction set of the kernels in use: "baseline", "avx2", "avx512" or "avx512_bf16" (VBMI and VBMI2 too). Chosen once
// per process. The environment variable LORS_CPU_CAPABILITY selects a lower one; the first call throws if this variable or one
// of the two below has another value.
const char* cpu_capability();

// Whether matmuls of this 16-bit type run in that type on this processor, rather than in float32: where it has instructions for
// them (AMX for the type, AVX512_BF16 for bfloat16). Without AVX-512 torch's bfloat16 matmuls were 6 to 380 times slower than
// float32 (docs/cpu.md). LORS_CPU_PRODUCT=float32 or native overrides it. Never timed, so that runs are reproducible.
bool cpu_multiplies_natively(DType dtype);

// Whether the forward or the input gradient of this many tokens uses fused_linear, rather than merge and torch's mm in float32
// or a 16-bit type. LORS_CPU_FUSED=always or never overrides it; always concerns float32 only.
// `is_plain`: for a dense weight without a mask or an adapter, which torch's mm can take as it is.
bool cpu_prefers_fused_linear(int64_t tokens, bool input_gradient, bool float32_matmul, bool is_plain);

}  // namespace lors
