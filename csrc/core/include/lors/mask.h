// SPDX-License-Identifier: Apache-2.0
// A mask as bits: bit k % 32 of word [n, k / 32] is mask[n, k]; bits beyond in_features are 0.
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct MaskPackArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const uint8_t* mask = nullptr;  // [N, K], one byte per weight, 0 or 1
  uint32_t* bits = nullptr;       // [N, ceil(K/32)]
};

struct MaskUnpackArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const uint32_t* bits = nullptr;  // [N, ceil(K/32)]
  uint8_t* mask = nullptr;         // [N, K]
};

// The mask of a weight that has none of its own: kept where it is not zero (-0.0 is zero, a NaN is not).
struct MaskNonzeroArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const void* weight = nullptr;  // [N, K] row-major
  DType dtype = DType::float32;
  uint32_t* bits = nullptr;  // [N, ceil(K/32)]
};

Status mask_pack(const MaskPackArgs& args, const CpuHost* host);
Status mask_pack(const MaskPackArgs& args, const CudaHost& host);
Status mask_unpack(const MaskUnpackArgs& args, const CpuHost* host);
Status mask_unpack(const MaskUnpackArgs& args, const CudaHost& host);
Status mask_nonzero(const MaskNonzeroArgs& args, const CpuHost* host);
Status mask_nonzero(const MaskNonzeroArgs& args, const CudaHost& host);

}  // namespace lors
