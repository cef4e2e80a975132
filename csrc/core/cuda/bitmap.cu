// SPDX-License-Identifier: Apache-2.0
// Launches compressing, decompressing and checking of bitmap weights. The merge is in merge_compressed.cu.
#include "bitmap.cuh"

#include <lors/bitmap.h>

#include "launch.h"
#include "scratch.h"

namespace lors {
namespace {

using namespace cuda;

BitmapProblem problem_of(int64_t N, int64_t K, const uint32_t* bits, const int64_t* row_offsets) {
  BitmapProblem p{};
  p.bits = bits;
  p.row_offsets = const_cast<int64_t*>(row_offsets);  // only bitmap_offsets writes them
  p.out_features = N;
  p.in_features = K;
  p.words = mask_words(K);
  return p;
}

Status launch_rows(const char* name, void (*kernel)(BitmapProblem), const BitmapProblem& p, const CudaHost& host) {
  constexpr int64_t kRows = kBitmapThreads / kWarp;
  const int64_t blocks = (p.out_features + kRows - 1) / kRows;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff)
    return Status::error(std::string(name) + " was given a weight of [" + std::to_string(p.out_features) + ", " +
                         std::to_string(p.in_features) + "], more than one launch covers; split it by rows.");
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBitmapThreads), 0, host, p);
}

template <bool kCompress>
Status launch_move(const char* name, DType dtype, const BitmapProblem& p, const CudaHost& host) {
  if (dtype == DType::float64)
    return Status::error(std::string(name) +
                         " on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or move "
                         "them to the CPU.");
  const auto kernel = dtype == DType::bfloat16  ? bitmap_move_kernel<bfloat16, kCompress>
                      : dtype == DType::float16 ? bitmap_move_kernel<float16, kCompress>
                                                : bitmap_move_kernel<float, kCompress>;
  return launch_rows(name, kernel, p, host);
}

}  // namespace

Status bitmap_offsets(const BitmapOffsetsArgs& args, const CudaHost& host) {
  const BitmapProblem p = problem_of(args.out_features, args.in_features, args.bits, args.row_offsets);
  if (Status status = launch_rows("bitmap_offsets", bitmap_count_kernel, p, host); !status.ok()) return status;
  return launch("bitmap_offsets", bitmap_scan_kernel, dim3(1), dim3(kWarp), 0, host, p);
}

Status bitmap_compress(const BitmapCompressArgs& args, const CudaHost& host) {
  BitmapProblem p = problem_of(args.out_features, args.in_features, args.bits, args.row_offsets);
  p.weight = const_cast<void*>(args.weight);
  p.values = args.values;
  return launch_move<true>("bitmap_compress", args.dtype, p, host);
}

Status bitmap_decompress(const BitmapDecompressArgs& args, const CudaHost& host) {
  BitmapProblem p = problem_of(args.out_features, args.in_features, args.bits, args.row_offsets);
  p.weight = args.weight;
  p.values = const_cast<void*>(args.values);
  return launch_move<false>("bitmap_decompress", args.dtype, p, host);
}

Status bitmap_validate(const BitmapValidateArgs& args, const CudaHost& host) {
  BitmapProblem p = problem_of(args.out_features, args.in_features, args.bits, args.row_offsets);
  p.count = args.count;
  constexpr int64_t kRows = kBitmapThreads / kWarp;
  const int64_t warps = (args.out_features + kRows - 1) / kRows * kRows;
  const Scratch tallies(host, warps * int64_t(sizeof(Tally)) / 4);
  p.tallies = reinterpret_cast<Tally*>(tallies.data());
  if (Status status = launch_rows("bitmap_validate", bitmap_validate_kernel, p, host); !status.ok()) return status;
  return launch("bitmap_validate", tally_sum_kernel<2>, dim3(1), dim3(kWarp), 0, host, static_cast<const Tally*>(p.tallies),
                warps, args.report);
}

}  // namespace lors
