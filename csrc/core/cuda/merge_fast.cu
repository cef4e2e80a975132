// SPDX-License-Identifier: Apache-2.0
// Launches the fast path of the merge; merge.cu decides when (merge_fast_config.h).
#include "merge_fast.cuh"

#include "launch.h"

namespace lors::cuda {
namespace {

template <template <typename, typename> typename Source, typename T>
Status run(const MergeProblem& p, const MergeConfig& config, const CudaHost& host) {
  const bool one = split_terms(p.lora_A.dtype) == 1 && split_terms(p.lora_B.dtype) == 1 && config.chunk == 16;
  return launch("merge", one ? merge_fast_kernel<Source, T, true> : merge_fast_kernel<Source, T, false>,
                dim3(static_cast<unsigned>(config.blocks)), dim3(kMergeFastThreads), config.shared_bytes, host, p,
                config.columns);
}

template <template <typename, typename> typename Source>
Status run(const MergeArgs& args, const MergeProblem& p, const MergeConfig& config, const CudaHost& host) {
  return args.weight_dtype == DType::bfloat16 ? run<Source, bfloat16>(p, config, host) : run<Source, float16>(p, config, host);
}

}  // namespace

Status merge_fast(const MergeArgs& args, const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  if (args.weight_layout == Layout::bitmap) return run<FastBitmap>(args, problem, config, host);
  if (args.weight_layout == Layout::sparse24)
    return args.merged_layout == Layout::sparse24 ? run<FastSparse24Values>(args, problem, config, host)
                                                  : run<FastSparse24>(args, problem, config, host);
  return args.mask ? run<FastMasked>(args, problem, config, host) : run<FastDense>(args, problem, config, host);
}

}  // namespace lors::cuda
