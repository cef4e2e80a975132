// SPDX-License-Identifier: Apache-2.0
// Layout "bitmap": any pattern; the kept values and one bit per weight, density + 1/16 of the dense bytes at 16 bits.
//   values       [row_offsets[N]]   the kept weights of row 0 by column, then of row 1, ...
//   bits         [N, ceil(K/32)]    the mask, as in mask.h
//   row_offsets  [N + 1] int64      where each row begins in values; row_offsets[0] = 0
#pragma once

#include <lors/status.h>
#include <lors/types.h>

namespace lors {

struct BitmapOffsetsArgs {
  int64_t out_features = 0;        // N
  int64_t in_features = 0;         // K
  const uint32_t* bits = nullptr;  // [N, ceil(K/32)]
  int64_t* row_offsets = nullptr;  // [N + 1], overwritten
};

struct BitmapCompressArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const void* weight = nullptr;  // [N, K] row-major
  DType dtype = DType::float32;
  const uint32_t* bits = nullptr;        // [N, ceil(K/32)]
  const int64_t* row_offsets = nullptr;  // [N + 1], as bitmap_offsets gives it for these bits
  void* values = nullptr;                // [row_offsets[N]] in dtype; a kept -0.0 is stored as +0
};

struct BitmapDecompressArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  const void* values = nullptr;  // [row_offsets[N]]
  DType dtype = DType::float32;
  const uint32_t* bits = nullptr;
  const int64_t* row_offsets = nullptr;
  void* weight = nullptr;  // [N, K] in dtype, overwritten whole; +0 off the mask
};

// Reads any bytes whatever without harm. report[0]: rows whose offsets disagree with the number of bits set in them, or that
// have bits beyond in_features; a row_offsets[0] that is not 0 counts against row 0, a row_offsets[N] that is not `count`
// against the last. report[1]: the first such row, INT64_MAX if none.
struct BitmapValidateArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t count = 0;  // how many values there are
  const uint32_t* bits = nullptr;
  const int64_t* row_offsets = nullptr;
  int64_t* report = nullptr;  // [2], overwritten; on CUDA in device memory
};

Status bitmap_offsets(const BitmapOffsetsArgs& args, const CpuHost* host);
Status bitmap_offsets(const BitmapOffsetsArgs& args, const CudaHost& host);
Status bitmap_compress(const BitmapCompressArgs& args, const CpuHost* host);
Status bitmap_compress(const BitmapCompressArgs& args, const CudaHost& host);
Status bitmap_decompress(const BitmapDecompressArgs& args, const CpuHost* host);
Status bitmap_decompress(const BitmapDecompressArgs& args, const CudaHost& host);
Status bitmap_validate(const BitmapValidateArgs& args, const CpuHost* host);
Status bitmap_validate(const BitmapValidateArgs& args, const CudaHost& host);

}  // namespace lors
