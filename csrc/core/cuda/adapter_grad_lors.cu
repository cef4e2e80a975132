// SPDX-License-Identifier: Apache-2.0
// Launches the "lors" adapter gradients: P = X A^T from one pass over X, Q = dY B and lora_B_grad from one pass over dY,
// lora_A_grad from one more over X. More than 64 ranks are taken in chunks; P and Q stay in float32.
#include "adapter_grad_lors.cuh"

#include <lors/adapter_grad.h>

#include "launch.h"
#include "reduce.cuh"

namespace lors {
namespace {

using namespace cuda;

template <typename Z, int kRanks>
Status launch_pass(const TokenFeatures& pass, bool project, bool reduce, const TokenConfig& config, int64_t blocks,
                   const CudaHost& host) {
  const auto kernel = !reduce    ? token_features_kernel<Z, kRanks, true, false>
                      : !project ? token_features_kernel<Z, kRanks, false, true>
                                 : token_features_kernel<Z, kRanks, true, true>;
  return launch("the adapter gradients", kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(kWarp * config.warps * config.warp_groups)), config.shared.total, host, pass);
}

template <typename Z>
Status launch_pass(int ranks, const TokenFeatures& pass, bool project, bool reduce, const TokenConfig& config, int64_t blocks,
                   const CudaHost& host) {
  if (ranks == 16) return launch_pass<Z, 16>(pass, project, reduce, config, blocks, host);
  if (ranks == 32) return launch_pass<Z, 32>(pass, project, reduce, config, blocks, host);
  return launch_pass<Z, 64>(pass, project, reduce, config, blocks, host);
}

Status launch_pass(DType z, int ranks, const TokenFeatures& pass, bool project, bool reduce, const TokenConfig& config,
                   int64_t blocks, const CudaHost& host) {
  if (z == DType::bfloat16) return launch_pass<bfloat16>(ranks, pass, project, reduce, config, blocks, host);
  if (z == DType::float16) return launch_pass<float16>(ranks, pass, project, reduce, config, blocks, host);
  return launch_pass<float>(ranks, pass, project, reduce, config, blocks, host);
}

TokenConfig config_of(const TokenFeatures& pass, const TokenTile& tile, bool project, bool reduce, DeviceLimits limits) {
  TokenProblem problem;
  problem.tokens = pass.tokens;
  problem.features = pass.features;
  problem.width = pass.width;
  problem.project = project;
  problem.reduce = reduce;
  problem.factor_terms = split_terms(pass.factor.dtype);
  return token_config(problem, tile, limits);
}

// One pass over Z; `pass` describes Z, the factor and the ranks. Unless null, `projected` [tokens, width] is written, and
// Z^T token_factor [features, width] goes to `gradient` (out, dtype, scale and pitch are set).
Status run_pass(TokenFeatures pass, DType z_dtype, int ranks, float* projected, const float* token_factor, PartialSums gradient,
                DeviceLimits limits, const CudaHost& host) {
  const TokenTile tile = token_tile(tile_ranks(ranks), split_terms(z_dtype));
  const bool project = projected != nullptr, reduce = token_factor != nullptr;
  const TokenConfig c = config_of(pass, tile, project, reduce, limits);
  if (c.tiles * c.ranges > 0x7fffffff)
    return Status::error("The adapter gradients found no tiling of " + std::to_string(pass.features) +
                         " features with as few blocks as CUDA can launch; use fewer features.");

  const int64_t tokens = pass.tokens;
  const bool panels = c.panel_tokens < tokens, parts = project && c.tiles > 1;
  const Scratch projected_parts(host, parts ? c.tiles * c.panel_tokens * pass.width : 0);
  const Scratch reduced_parts(host, reduce ? c.ranges * pass.features * pass.width : 0);
  const Scratch reduced_sum(host, reduce && panels ? pass.features * pass.width : 0);
  gradient.rows = pass.features;
  gradient.width = pass.width;
  gradient.columns = ranks;
  const char* const z = static_cast<const char*>(pass.z);
  for (int64_t token = 0; token < tokens; token += c.panel_tokens) {
    pass.tokens = tokens - token < c.panel_tokens ? tokens - token : c.panel_tokens;
    pass.z = z + token * pass.features * dtype_size(z_dtype);
    pass.token_factor = token_factor ? token_factor + token * pass.width : nullptr;
    pass.projected = parts ? projected_parts.data() : projected ? projected + token * pass.width : nullptr;
    pass.reduced = reduced_parts.data();
    pass.tiles = c.tiles;
    pass.range_tokens = c.range_tokens;
    pass.warp_groups = c.warp_groups;
    pass.group_warps = c.warps;
    pass.tile_features = c.features;
    pass.feature_groups = tile.feature_groups(c.warps);
    pass.shared = c.shared;
    const int64_t ranges = (pass.tokens + c.range_tokens - 1) / c.range_tokens;
    Status status = launch_pass(z_dtype, tile.ranks, pass, project, reduce, c, c.tiles * ranges, host);
    if (status.ok() && parts) {
      PartialSums sums;
      sums.partials = pass.projected;
      sums.count = c.tiles;
      sums.rows = pass.tokens;
      sums.width = sums.columns = sums.out_pitch = pass.width;
      sums.out = projected + token * pass.width;
      status = reduce_partials(sums, host);
    }
    if (status.ok() && reduce) {
      PartialSums sums = panels ? panel_sums(gradient, reduced_sum.data(), token == 0) : gradient;
      sums.partials = pass.reduced;
      sums.count = ranges;
      status = reduce_partials(sums, host);
    }
    if (!status.ok()) return status;
  }
  if (!reduce || !panels) return {};
  gradient.partials = reduced_sum.data();
  gradient.count = 1;
  return reduce_partials(gradient, host);
}

}  // namespace

Status adapter_grad_lors(const AdapterGradArgs& args, const CudaHost& host) {
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features, r = args.r;
  if (Status status = check_no_float64("adapter_grad_lors",
                                       {args.grad_output_dtype, args.input_dtype, args.lora_A_dtype, args.lora_B_dtype});
      !status.ok())
    return status;
  PartialSums grad_A, grad_B;  // [r, K] and [N, r]
  grad_A.out = args.lora_A_grad;
  grad_A.out_pitch = K;
  grad_A.dtype = args.lora_A_dtype;
  grad_A.transpose = true;
  grad_B.out = args.lora_B_grad;
  grad_B.out_pitch = r;
  grad_B.dtype = args.lora_B_dtype;
  grad_A.scale = grad_B.scale = static_cast<float>(args.scaling);

  if (T == 0 || N == 0 || K == 0) {  // empty sums: zeros
    grad_A.rows = K;
    grad_B.rows = N;
    grad_A.columns = grad_B.columns = r;
    if (args.lora_A_grad)
      if (Status status = reduce_partials(grad_A, host); !status.ok()) return status;
    return args.lora_B_grad ? reduce_partials(grad_B, host) : Status();
  }
  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;

  TokenFeatures over_X, over_dY;
  over_X.z = args.input;
  over_X.z_vectors = has_vectors(args.input, K);
  over_X.features = K;
  over_X.factor = matrix(args.lora_A, args.lora_A_dtype, r, K);
  over_X.factor_by_rank = true;
  over_dY.z = args.grad_output;
  over_dY.z_vectors = has_vectors(args.grad_output, N);
  over_dY.features = N;
  over_dY.factor = matrix(args.lora_B, args.lora_B_dtype, N, r);
  over_X.tokens = over_dY.tokens = T;

  // The largest chunk of ranks for which every pass fits the device's shared memory.
  int chunk = tile_ranks(r);
  for (;; chunk /= 2) {
    over_X.width = over_dY.width = chunk;
    const TokenTile tile_X = token_tile(chunk, split_terms(args.input_dtype));
    const TokenTile tile_dY = token_tile(chunk, split_terms(args.grad_output_dtype));
    const bool fits = config_of(over_X, tile_X, true, false, limits).warps > 0 &&
                      config_of(over_X, tile_X, false, true, limits).warps > 0 &&
                      config_of(over_dY, tile_dY, true, true, limits).warps > 0;
    if (fits) break;
    if (chunk == 16)
      return Status::error("The adapter gradients do not fit a device with " + std::to_string(limits.shared_bytes) +
                           " bytes of shared memory per block; use a GPU of architecture 80 or later.");
  }
  const int64_t width = r < chunk ? (r + 3) / 4 * 4 : chunk;
  const Scratch P(host, args.lora_B_grad ? T * width : 0), Q(host, args.lora_A_grad ? T * width : 0);
  for (int64_t rank = 0; rank < r; rank += chunk) {
    const int ranks = static_cast<int>(r - rank < chunk ? r - rank : chunk);
    over_X.rank = over_dY.rank = rank;
    over_X.width = over_dY.width = (ranks + 3) / 4 * 4;
    if (args.lora_A_grad) grad_A.out = static_cast<char*>(args.lora_A_grad) + rank * K * dtype_size(args.lora_A_dtype);
    if (args.lora_B_grad) grad_B.out = static_cast<char*>(args.lora_B_grad) + rank * dtype_size(args.lora_B_dtype);

    Status status;
    if (args.lora_B_grad) status = run_pass(over_X, args.input_dtype, ranks, P.data(), nullptr, {}, limits, host);
    if (status.ok()) status = run_pass(over_dY, args.grad_output_dtype, ranks, Q.data(), P.data(), grad_B, limits, host);
    if (status.ok() && args.lora_A_grad)
      status = run_pass(over_X, args.input_dtype, ranks, nullptr, Q.data(), grad_A, limits, host);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace lors
