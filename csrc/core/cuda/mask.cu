// SPDX-License-Identifier: Apache-2.0
// Launches the packing and unpacking of masks.
#include "mask.cuh"

#include <lors/mask.h>

#include "launch.h"

namespace lors {
namespace {

using namespace cuda;

Status launch_mask(const char* name, void (*kernel)(MaskProblem), const uint8_t* mask, const uint32_t* bits, int64_t N,
                   int64_t K, const CudaHost& host, const void* weight = nullptr) {
  MaskProblem problem{};
  problem.weight = weight;
  // Each kernel writes one of the two and only reads the other.
  problem.mask = const_cast<uint8_t*>(mask);
  problem.bits = reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(bits));
  problem.out_features = N;
  problem.in_features = K;
  problem.halves = 2 * mask_words(K);
  problem.vectors = weight != nullptr ? has_vectors(weight, K) : K % 16 == 0 && reinterpret_cast<uintptr_t>(mask) % 16 == 0;
  const int64_t blocks = (N * problem.halves + kMaskThreads - 1) / kMaskThreads;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff)
    return Status::error(std::string(name) + " was given a mask of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "], more than one launch covers; split it by rows.");
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMaskThreads), 0, host, problem);
}

}  // namespace

Status mask_pack(const MaskPackArgs& args, const CudaHost& host) {
  return launch_mask("mask_pack", mask_pack_kernel, args.mask, args.bits, args.out_features, args.in_features, host);
}

Status mask_unpack(const MaskUnpackArgs& args, const CudaHost& host) {
  return launch_mask("mask_unpack", mask_unpack_kernel, args.mask, args.bits, args.out_features, args.in_features, host);
}

Status mask_nonzero(const MaskNonzeroArgs& args, const CudaHost& host) {
  if (args.dtype == DType::float64)
    return Status::error(
        "mask_nonzero on CUDA takes float32, bfloat16 and float16, and was given float64; convert the weight or move it to the "
        "CPU.");
  const auto kernel = args.dtype == DType::bfloat16  ? mask_nonzero_kernel<bfloat16>
                      : args.dtype == DType::float16 ? mask_nonzero_kernel<float16>
                                                     : mask_nonzero_kernel<float>;
  return launch_mask("mask_nonzero", kernel, nullptr, args.bits, args.out_features, args.in_features, host, args.weight);
}

}  // namespace lors
