// SPDX-License-Identifier: Apache-2.0
// Layout "2:4": at most two kept weights in each aligned group of four along K, 0.5625 x the dense bytes at 16 bits.
//   values    [N, K/2]        group g of a row has slots 2 g and 2 g + 1; a slot that holds no kept weight is +0
//   metadata  [N, ceil(K/8)]  bytes; group g is the low (g even) or high (g odd) four bits of byte g / 2, one code
// A code is two positions of two bits each, first | second << 2:
//   first < second    both kept: `first` in slot 0, `second` in slot 1
//   first == second   one kept, at that position p: in slot 1 if p == 3, else in slot 0
//   first 1, second 0 none kept
// The other five codes do not occur; beyond the last group the code is 0. So the mask is exact also where a group keeps fewer
// than two weights or keeps a zero, and the slots are those of the sparse tensor cores (docs/formats.md).
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct Sparse24MaskArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const uint8_t* metadata = nullptr;  // [N, ceil(K/8)], valid
  uint32_t* mask = nullptr;           // [N, ceil(K/32)], bits beyond in_features 0
};

Status sparse24_mask(const Sparse24MaskArgs& args, const CpuHost* host);
Status sparse24_mask(const Sparse24MaskArgs& args, const CudaHost& host);

}  // namespace lors
