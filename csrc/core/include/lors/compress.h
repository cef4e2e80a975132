// SPDX-License-Identifier: Apache-2.0
// What the compressed layouts store of a dense weight. On the CPU only, and only this: a weight is compressed once in its life,
// by python/lors_cuda/formats.py, and this is the step at which plain torch is ten times slower there.
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct CompressArgs {
  int64_t out_features = 0;      // N
  int64_t in_features = 0;       // K
  const void* weight = nullptr;  // [N, K] row-major
  DType dtype = DType::float32;
  const uint32_t* mask = nullptr;        // [N, ceil(K/32)] bits, 1 = kept; none beyond in_features
  const int64_t* row_offsets = nullptr;  // [N + 1]: how many bits are set before each row
  void* values = nullptr;                // [row_offsets[N]] in dtype: the kept weights, row by row; -0.0 as +0.0
};

Status compress(const CompressArgs& args, const CpuHost* host);

}  // namespace lors
