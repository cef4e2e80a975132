// SPDX-License-Identifier: Apache-2.0
// What the CPU backend found on this processor.
#pragma once

#include <lors/types.h>

namespace lors {

// The instruction set of the kernels in use: "baseline", "avx2" or "avx512". Chosen once per process; the environment
// variable LORS_CPU_CAPABILITY lowers it. The first call refuses this variable and the two below, with a sentence, if one has
// another value than its own.
const char* cpu_capability();

// Whether a matrix product of this 16-bit type is faster on this processor in its own type than in float32. True with the
// AMX tiles for that type. Without AVX-512, torch's bfloat16 products were 6 to 380 times slower than float32 (docs/cpu.md);
// with AVX-512 and no AMX the choice of float32 has not been measured by this repository.
// LORS_CPU_PRODUCT=float32 or native overrides it. Asked once per process; never timed, so that runs are repeatable.
bool cpu_multiplies_natively(DType dtype);

// Whether float32 products of this many tokens go through fused_linear rather than merge and the library's own product.
// LORS_CPU_FUSED=always or never overrides it.
bool cpu_prefers_fused_linear(int64_t tokens);

}  // namespace lors
