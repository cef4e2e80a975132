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

// What is known of a dense weight before it is compressed.
struct Sparse24Report {
  int64_t offending_groups = 0;   // aligned groups of four along K with more than two kept
  int64_t first_offender = 0;     // of these the first: n * (K / 4) + g; INT64_MAX if there is none
  int64_t offending_columns = 0;  // aligned groups of four along N (the last may be shorter) with more than two kept
};

struct Sparse24InspectArgs {
  int64_t out_features = 0;      // N
  int64_t in_features = 0;       // K, a multiple of 4
  const void* weight = nullptr;  // [N, K] row-major
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;    // [N, ceil(K/32)] bits, 1 = kept; null: kept where weight != 0 (-0.0 counts as zero)
  Sparse24Report* report = nullptr;  // overwritten; on CUDA in device memory
};

// The weight must have no offending group: what is third or fourth in its group would be lost.
struct Sparse24CompressArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;       // a multiple of 4
  const void* weight = nullptr;  // [N, K]
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;  // as above; a kept -0.0 is stored as +0
  void* values = nullptr;          // [N, K/2] in weight_dtype
  uint8_t* metadata = nullptr;     // [N, ceil(K/8)]; null: not wanted
};

struct Sparse24DecompressArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const void* values = nullptr;  // [N, K/2]
  DType dtype = DType::float32;
  const uint8_t* metadata = nullptr;  // [N, ceil(K/8)], valid
  void* weight = nullptr;             // [N, K] in dtype, overwritten whole; +0 off the mask
};

struct Sparse24MaskArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const uint8_t* metadata = nullptr;  // [N, ceil(K/8)], valid
  uint32_t* mask = nullptr;           // [N, ceil(K/32)], bits beyond in_features 0
};

// Reads any bytes whatever without harm. report[0]: bytes of metadata with a code that does not occur, with bits beyond the
// last group, or whose groups hold anything but +0 in a slot without a kept weight. report[1]: index of the first of them in
// metadata, INT64_MAX if none.
struct Sparse24ValidateArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const void* values = nullptr;  // [N, K/2]; null: only the metadata is looked at
  DType dtype = DType::float32;
  const uint8_t* metadata = nullptr;
  int64_t* report = nullptr;  // [2], overwritten; on CUDA in device memory
};

Status sparse24_inspect(const Sparse24InspectArgs& args, const CpuHost* host);
Status sparse24_inspect(const Sparse24InspectArgs& args, const CudaHost& host);
Status sparse24_compress(const Sparse24CompressArgs& args, const CpuHost* host);
Status sparse24_compress(const Sparse24CompressArgs& args, const CudaHost& host);
Status sparse24_decompress(const Sparse24DecompressArgs& args, const CpuHost* host);
Status sparse24_decompress(const Sparse24DecompressArgs& args, const CudaHost& host);
Status sparse24_mask(const Sparse24MaskArgs& args, const CpuHost* host);
Status sparse24_mask(const Sparse24MaskArgs& args, const CudaHost& host);
Status sparse24_validate(const Sparse24ValidateArgs& args, const CpuHost* host);
Status sparse24_validate(const Sparse24ValidateArgs& args, const CudaHost& host);

}  // namespace lors
