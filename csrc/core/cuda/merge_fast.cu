// SPDX-License-Identifier: Apache-2.0
// Launches the fast path of the merge; merge.cu decides when (merge_fast_config.h).
#include "merge_fast.cuh"

#include "launch.h"
#include "merge_fast_quantized.cuh"

namespace lors::cuda {
namespace {

template <template <typename, typename> typename Source>
constexpr bool kReadsCodes = requires { Source<bfloat16, FastLanes<false, kMergeFastThreads>>::kReadsCodes; };

template <template <typename, typename> typename Source, typename T>
Status run(const MergeProblem& p, const MergeConfig& config, const CudaHost& host) {
  auto* kernel = merge_fast_kernel<Source, T, false>;
  // Adapters of one split term are bfloat16. They seldom meet a float16 result: of quantised weights that has no kernel of its
  // own.
  if constexpr (std::is_same_v<T, bfloat16> || !kReadsCodes<Source>)
    if (split_terms(p.lora_A.dtype) == 1 && split_terms(p.lora_B.dtype) == 1 && config.chunk == 16)
      kernel = merge_fast_kernel<Source, T, true>;
  return launch("merge", kernel, dim3(static_cast<unsigned>(config.blocks)), dim3(kMergeFastThreads), config.shared_bytes, host,
                p, config.columns);
}

template <template <typename, typename> typename Source>
Status run(const MergeArgs& args, const MergeProblem& p, const MergeConfig& config, const CudaHost& host) {
  return args.merged_dtype == DType::bfloat16 ? run<Source, bfloat16>(p, config, host) : run<Source, float16>(p, config, host);
}

}  // namespace

Status merge_fast(const MergeArgs& args, const MergeProblem& problem, const MergeConfig& config, const CudaHost& host) {
  if (args.quantization.grid != Grid::none) {
    const bool e4m3 = args.quantization.grid == Grid::e4m3;
    if (args.weight_layout == Layout::sparse24)
      return e4m3 ? run<FastE4m3Groups>(args, problem, config, host) : run<FastIntegerGroups>(args, problem, config, host);
    return e4m3 ? run<FastE4m3Bits>(args, problem, config, host) : run<FastIntegerBits>(args, problem, config, host);
  }
  if (args.weight_layout == Layout::bitmap) return run<FastBitmap>(args, problem, config, host);
  if (args.weight_layout == Layout::sparse24)
    return args.merged_layout == Layout::sparse24 ? run<FastSparse24Values>(args, problem, config, host)
                                                  : run<FastSparse24>(args, problem, config, host);
  return args.mask ? run<FastMasked>(args, problem, config, host) : run<FastDense>(args, problem, config, host);
}

}  // namespace lors::cuda
