// SPDX-License-Identifier: Apache-2.0
// Launches the kernel that spells the mask of a 2:4 weight out.
#include "mask.cuh"

#include <lors/sparse24.h>

#include "launch.h"

namespace lors {

Status sparse24_mask(const Sparse24MaskArgs& args, const CudaHost& host) {
  using namespace cuda;
  const int64_t N = args.out_features, K = args.in_features, words = mask_words(K);
  const int64_t blocks = (N * words + kMaskThreads - 1) / kMaskThreads;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff)
    return Status::error("sparse24_mask was given a weight of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "], more than one launch covers; split it by rows.");
  const bool whole_words = K % 32 == 0 && reinterpret_cast<uintptr_t>(args.metadata) % 4 == 0;
  const MaskProblem problem{args.metadata, args.mask, N, K, sparse24_metadata_bytes(K), words, whole_words};
  return launch("sparse24_mask", sparse24_mask_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMaskThreads), 0, host,
                problem);
}

}  // namespace lors
