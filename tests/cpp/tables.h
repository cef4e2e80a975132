// SPDX-License-Identifier: Apache-2.0
// The tables of CPU kernels, to run a test with each that this processor can run.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "kernels.h"

namespace lors::cpu {

extern const KernelTable table_baseline;
extern const KernelTable table_wide;
#if defined(__x86_64__)
extern const KernelTable table_avx2;
extern const KernelTable table_avx512;
extern const KernelTable table_avx512_bf16;
inline const KernelTable* const kTables[] = {&table_baseline, &table_wide, &table_avx2, &table_avx512, &table_avx512_bf16};
#else
inline const KernelTable* const kTables[] = {&table_baseline, &table_wide};
#endif

// Why this processor cannot run `table`; empty if it can.
inline std::string unsupported(const KernelTable* table) {
#if defined(__x86_64__)
  if (table == &table_avx2 && !__builtin_cpu_supports("avx2")) return "this processor has no AVX2";
  if (table == &table_avx512 && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")))
    return "this processor has no AVX-512; the table `wide` runs the same code in baseline instructions";
  if (table == &table_avx512_bf16 &&
      !(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")))
    return "this processor has no AVX512_BF16, VBMI or VBMI2";
#endif
  (void)table;
  return "";
}
#define LORS_SKIP_UNSUPPORTED(table) \
  if (const std::string reason = unsupported(table); !reason.empty()) GTEST_SKIP() << reason

inline std::string table_name(const testing::TestParamInfo<const KernelTable*>& info) { return info.param->name; }

}  // namespace lors::cpu
