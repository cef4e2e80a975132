// SPDX-License-Identifier: Apache-2.0
// Whether two matrices are multiplied as bfloat16 pairs (bfloat16_pairs.h). It depends on the processor and on all of their
// elements, not on threads, layouts or tiles: every function that multiplies the same two matrices decides alike.
#pragma once

#include <atomic>

#include "kernels.h"
#include "workspace.h"

namespace lors::cpu {

struct Elements {
  const void* data;
  DType dtype;
  int64_t count;
};

inline bool in_pairs(const KernelTable& table, const Elements& a, const Elements& b, const CpuHost* host) {
  if (!table.pairs_are_exact || a.dtype != DType::bfloat16 || b.dtype != DType::bfloat16) return false;
  std::atomic<bool> exact = true;
  for (const Elements& e : {a, b})
    parallel_for(host, e.count, 1 << 18, [&](int64_t begin, int64_t end) {
      if (!table.pairs_are_exact(static_cast<const uint16_t*>(e.data) + begin, end - begin)) exact = false;
    });
  return exact;
}

}  // namespace lors::cpu
