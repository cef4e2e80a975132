// SPDX-License-Identifier: Apache-2.0
// The table of kernels and the matmul dtypes for this processor. Decided once, from cpuid and the environment.
#include <lors/cpu.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lors::cpu {

extern const KernelTable table_baseline;
#if defined(__x86_64__)
extern const KernelTable table_avx2;
extern const KernelTable table_avx512;
extern const KernelTable table_avx512_bf16;
#endif

namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

#if defined(__x86_64__)
// clang 14's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
#endif

bool prefers_fused(int64_t tokens, bool input_gradient, bool float32_matmul, bool is_plain) {
  static const std::string wanted = environment("LORS_CPU_FUSED");
  if (wanted == "always" && float32_matmul && !is_plain) return true;
  if (wanted == "never") return false;
  if (!wanted.empty() && wanted != "always")
    throw std::runtime_error("LORS_CPU_FUSED is '" + wanted + "'; set it to always or never, or leave it unset.");
  // Of a dense weight torch's mm was faster from two bfloat16 tokens on, and as fast with one float32 token (Zen 4, one
  // thread).
  if (is_plain && (float32_matmul ? tokens == 1 : tokens > 1)) return false;
  if (tokens <= kFewTokens && !input_gradient && (!is_plain || kernels().dots_stored)) return true;
  if (is_plain) return false;
  // While tuning (AVX2, 2048 x 2048, one thread, a shared machine) fused_linear took 0.3 to 1 ms more than the bare matmul at
  // 128 and 512 tokens, a merge about 2.5 ms; equal at 2048. Where between 512 and 2048 they cross was not measured.
  return float32_matmul && tokens <= 1024;
}

// Whether the processor has matmul instructions for this type. Measured (docs/cpu.md): with AVX512_BF16 torch's bfloat16 mm
// runs at twice the rate of float32; without such instructions it is slower than float32, by up to hundreds of times.
bool has_matmul_instructions(DType dtype) {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (dtype == DType::bfloat16 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1)) return true;  // AMX-BF16
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  if (dtype == DType::bfloat16) return (eax >> 5 & 1) && __builtin_cpu_supports("avx512f");  // AVX512_BF16
  if (dtype == DType::float16) return eax >> 21 & 1;                                         // AMX-FP16
#endif
  return false;
}

bool multiplies_natively(DType dtype) {
  static const std::string wanted = environment("LORS_CPU_PRODUCT");
  if (wanted == "native") return true;
  if (wanted == "float32") return false;
  if (!wanted.empty())
    throw std::runtime_error("LORS_CPU_PRODUCT is '" + wanted + "'; set it to float32 or native, or leave it unset.");
  return has_matmul_instructions(dtype);
}

const KernelTable* choose() {
  // The other variables as well: a wrong value is refused by the first call, whichever kernel that needs.
  prefers_fused(0, true, true, false);
  multiplies_natively(DType::bfloat16);
  struct Choice {
    const KernelTable* table;
    bool supported;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vbmi2");
  const Choice choices[] = {{&table_avx512_bf16, bf16}, {&table_avx512, avx512}, {&table_avx2, avx2}, {&table_baseline, true}};
#else
  const Choice choices[] = {{&table_baseline, true}};
#endif
  const std::string wanted = environment("LORS_CPU_CAPABILITY");
  for (const Choice& choice : choices) {
    if (wanted.empty() ? !choice.supported : wanted != choice.table->name) continue;
    if (choice.supported) return choice.table;
    throw std::runtime_error("LORS_CPU_CAPABILITY asks for " + wanted +
                             ", which this processor does not have; unset it, or set it to baseline.");
  }
  throw std::runtime_error("LORS_CPU_CAPABILITY is '" + wanted +
                           "'; set it to baseline, avx2, avx512 or avx512_bf16, or leave it unset for the best this "
                           "processor has.");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* table = choose();
  return *table;
}

}  // namespace lors::cpu

namespace lors {

const char* cpu_capability() { return cpu::kernels().name; }

bool cpu_prefers_fused_linear(int64_t tokens, bool input_gradient, bool float32_matmul, bool is_plain) {
  return cpu::prefers_fused(tokens, input_gradient, float32_matmul, is_plain);
}

bool cpu_multiplies_natively(DType dtype) {
  static const bool bfloat16 = cpu::multiplies_natively(DType::bfloat16);
  static const bool float16 = cpu::multiplies_natively(DType::float16);
  return dtype == DType::bfloat16 ? bfloat16 : dtype == DType::float16 ? float16 : true;
}

}  // namespace lors
