// SPDX-License-Identifier: Apache-2.0
// Launches the "lors" adapter gradients: one launch for P = X A^T and Q = dY B, one for lora_B_grad and lora_A_grad, and one
// more for the sum of partial sums where there are any. More than 128 ranks, or fewer on a device with little shared memory,
// are taken in chunks.
#include <lors/adapter_grad.h>

#include "adapter_grad_lors_cluster.cuh"

namespace lors {
namespace {

using namespace cuda;

template <typename Z>
Status launch_projections(const ProjectProblem& problem, int64_t blocks, int shared_bytes, const CudaHost& host) {
  return launch("the projections of the adapter gradients", project_kernel<Z>, dim3(static_cast<unsigned>(blocks)),
                dim3(kLorsWarps * kWarp), shared_bytes, host, problem);
}

template <typename Z>
Status launch_gradients(const GradientProblem& problem, int64_t blocks, const GradientConfig& config, bool clusters,
                        const CudaHost& host) {
  const char* const name = "the adapter gradients";
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(config.warps(problem.width) * kWarp));
  if (clusters)
    return launch(name, cluster_gradient_kernel, {grid, static_cast<unsigned>(config.ranges)}, block, config.shared_bytes, host,
                  problem, config.mbarriers_at);
  return launch(name, gradient_kernel<Z>, grid, block, config.shared_bytes, host, problem);
}

// Of the sums for P and Q and with them: what an expert has is not known here.
int64_t known_tokens(const AdapterGradArgs& args) { return args.experts.offsets ? 0 : args.tokens; }

// One pass: the ranks [rank, rank + shape.width). Side 0 is X with lora_A, side 1 dY with lora_B; sums[i] is the gradient that
// side i of the second launch writes, of lora_A and of lora_B, without an `out` if it is not wanted.
template <typename Z>
Status run_pass(const AdapterGradArgs& args, int64_t rank, LorsShape shape, const PartialSums (&sums)[2], DeviceLimits limits,
                const CudaHost& host) {
  const int64_t T = args.tokens, features[2] = {args.in_features, args.out_features}, experts = args.experts.count;
  const void* const z[2] = {args.input, args.grad_output};
  const Matrix factors[2] = {matrix(args.lora_A, args.lora_A_dtype, args.r, args.in_features),
                             matrix(args.lora_B, args.lora_B_dtype, args.out_features, args.r)};
  const bool wanted[2] = {sums[0].out != nullptr, sums[1].out != nullptr};
  // The gradient of one side's features takes the projection of the other side.
  LorsShape project_shape = shape;
  for (int i = 0; i < 2; ++i) {
    project_shape.features[i] = wanted[1 - i] ? features[i] : 0;
    shape.features[i] = wanted[i] ? features[i] : 0;
  }
  const ProjectConfig pc = project_config(project_shape, limits);
  const GradientConfig gc = gradient_config(shape, limits);
  const bool in_parts = gc.ranges > 1 && !shape.clusters;
  int terms[2];  // of each side's projection
  int64_t blocks[2][2], partials_at[2] = {}, partial_floats = 0;
  for (int i = 0; i < 2; ++i) {
    terms[i] = token_terms(split_terms(dtype_of<Z>()), known_tokens(args), features[i]);
    blocks[0][i] = wanted[1 - i] ? pc.blocks : 0;
    blocks[1][i] = gc.tiles[i] * gc.ranges * experts;
    partials_at[i] = partial_floats;
    if (wanted[i] && in_parts) partial_floats += gc.ranges * sums[i].rows * sums[i].width;
  }
  if (blocks[0][0] + blocks[0][1] > 0x7fffffff || blocks[1][0] + blocks[1][1] > 0x7fffffff || gc.range_tokens > 1 << 30)
    return Status::error("The adapter gradients found no tiling of " + std::to_string(T) + " tokens and " +
                         std::to_string(args.out_features) + " and " + std::to_string(args.in_features) +
                         " features with as few blocks as CUDA can launch; use fewer.");

  const int64_t size = T * shape.width;  // of a projection's term, in 16-bit elements
  const Scratch projected(host, size * ((wanted[1] ? terms[0] : 0) + (wanted[0] ? terms[1] : 0)) / 2);
  const Scratch partials(host, partial_floats);
  uint16_t* const of_side[2] = {reinterpret_cast<uint16_t*>(projected.data()),
                                reinterpret_cast<uint16_t*>(projected.data()) + (wanted[1] ? size * terms[0] : 0)};
  ProjectProblem project{};
  GradientProblem gradient{};
  for (int i = 0; i < 2; ++i) {
    const bool vectors = has_vectors(z[i], features[i]);
    const int factor_pitch = lors_pitch(shape.width, shape.factor_size[i], true);
    const int64_t expert_rows = i == 0 ? args.r : args.out_features;
    const int32_t* const gather = i == 0 ? args.experts.gather : nullptr;
    project.side[i] = {z[i], gather, features[i], factors[i], of_side[i], terms[i], factor_pitch, vectors, i == 0};
    gradient.side[i] = {
        z[i],       features[i],  gc.tiles[i], of_side[1 - i], in_parts ? partials.data() + partials_at[i] : nullptr,
        sums[i],    terms[1 - i], vectors,     i == 0,         gather,
        expert_rows};
    gradient.side[i].sums.vectors = has_fours(sums[i]);
    gradient.side[i].sums.partials = gradient.side[i].partials;
    gradient.side[i].sums.count = gc.ranges;
  }
  project.tokens = gradient.tokens = T;
  project.experts = gradient.experts = cuda::expert_rows(args.experts);
  project.rank = rank;
  project.width = gradient.width = shape.width;
  project.token_tiles = pc.token_tiles;
  project.factor_at = pc.factor_at;
  project.stage = pc.stage;
  project.blocks = static_cast<unsigned>(blocks[0][0]);
  gradient.range_tokens = gc.range_tokens;
  gradient.feature_groups = gc.feature_groups;
  gradient.token_groups = gc.token_groups;
  gradient.step_tokens = gc.step_tokens;
  gradient.terms_at = gc.terms_at;
  gradient.stage = gc.stage;
  gradient.pitch = lors_pitch(64 * gc.feature_groups, shape.size, true);
  gradient.terms_pitch = lors_pitch(shape.width, 2, true);
  gradient.blocks = static_cast<unsigned>(blocks[1][0]);
  if (Status status = launch_projections<Z>(project, blocks[0][0] + blocks[0][1], pc.shared_bytes, host); !status.ok())
    return status;
  if (Status status = launch_gradients<Z>(gradient, blocks[1][0] + blocks[1][1], gc, shape.clusters, host);
      !status.ok() || !in_parts)
    return status;
  PartialSums parts[2];
  for (int i = 0; i < 2; ++i)
    if (wanted[i]) parts[i] = gradient.side[i].sums;
  return reduce_partials({parts[0], parts[1]}, host);
}

}  // namespace

Status adapter_grad_lors(const AdapterGradArgs& args, const CudaHost& host) {
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features, r = args.r;
  if (Status status = check_no_float64("adapter_grad_lors",
                                       {args.grad_output_dtype, args.input_dtype, args.lora_A_dtype, args.lora_B_dtype});
      !status.ok())
    return status;
  if (args.grad_output_dtype != args.input_dtype)
    return Status::error(std::string("adapter_grad_lors multiplies grad_output and input in one dtype, and was given ") +
                         dtype_name(args.grad_output_dtype) + " and " + dtype_name(args.input_dtype) +
                         "; convert one of them.");
  if (Status status = check_experts("adapter_grad_lors", args.experts, T); !status.ok()) return status;
  if (r == 0 || (!args.lora_A_grad && !args.lora_B_grad)) return {};
  PartialSums sums[2];  // of lora_A [r, K] and of lora_B [N, r]
  sums[0].out = args.lora_A_grad;
  sums[0].rows = args.lora_A_grad ? r : 0;
  sums[0].columns = sums[0].out_pitch = K;
  sums[0].width = (K + 3) / 4 * 4;
  sums[0].dtype = args.lora_A_dtype;
  sums[1].out = args.lora_B_grad;
  sums[1].rows = args.lora_B_grad ? N : 0;
  sums[1].columns = sums[1].out_pitch = r;
  sums[1].dtype = args.lora_B_dtype;
  sums[0].scale = sums[1].scale = static_cast<float>(args.scaling);
  if (T == 0 || N == 0 || K == 0) {  // empty sums: zeros
    for (PartialSums& of : sums) of.rows *= args.experts.count;
    return reduce_partials({sums[0], sums[1]}, host);
  }

  DeviceLimits limits;
  if (Status status = device_limits(limits); !status.ok()) return status;
  LorsShape shape;
  shape.tokens = T;
  shape.experts = args.experts.offsets ? args.experts.count : 0;
  shape.features[0] = K;
  shape.features[1] = N;
  shape.size = static_cast<int>(dtype_size(args.input_dtype));
  shape.factor_size[0] = static_cast<int>(dtype_size(args.lora_A_dtype));
  shape.factor_size[1] = static_cast<int>(dtype_size(args.lora_B_dtype));
  shape.terms = token_terms(split_terms(args.input_dtype), known_tokens(args), N < K ? N : K);
  shape.clusters = gradients_in_clusters(
      limits.architecture, args.input_dtype,
      (!args.lora_A_grad || has_vectors(args.input, K)) && (!args.lora_B_grad || has_vectors(args.grad_output, N)));
  // As many ranks as fit the device's shared memory.
  for (shape.width = lors_width(r);; shape.width /= 2) {
    if (project_config(shape, limits).token_tiles > 0 && gradient_config(shape, limits).feature_groups > 0) break;
    if (shape.width == 16)
      return Status::error("The adapter gradients do not fit a device with " + std::to_string(limits.shared_bytes) +
                           " bytes of shared memory per block; use a GPU of architecture 80 or later.");
  }
  const auto run = args.input_dtype == DType::bfloat16  ? run_pass<bfloat16>
                   : args.input_dtype == DType::float16 ? run_pass<float16>
                                                        : run_pass<float>;
  for (int64_t rank = 0; rank < r; rank += shape.width) {
    const int64_t ranks = r - rank < shape.width ? r - rank : shape.width;
    if (sums[0].out) sums[0].out = static_cast<char*>(args.lora_A_grad) + rank * K * dtype_size(args.lora_A_dtype);
    if (sums[1].out) sums[1].out = static_cast<char*>(args.lora_B_grad) + rank * dtype_size(args.lora_B_dtype);
    if (sums[0].out) sums[0].rows = ranks;
    sums[1].columns = ranks;
    sums[1].width = shape.width;
    if (Status status = run(args, rank, shape, sums, limits, host); !status.ok()) return status;
  }
  return {};
}

}  // namespace lors
