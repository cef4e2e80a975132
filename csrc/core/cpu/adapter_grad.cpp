// SPDX-License-Identifier: Apache-2.0
// The adapter gradients and the bias gradient on the CPU, as matmuls with a thin factor (contract_kernel.h) over dY, X or a
// panel of dY^T X. No sum is split between threads, so results do not depend on the number of threads.
#include <lors/adapter_grad.h>

#include "kernels.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

namespace {

constexpr int64_t kGrainElements = 32768;  // elements of the big matrix below which a second thread does not pay

int64_t grain(int64_t other_side) { return 1 + kGrainElements / (other_side > 0 ? other_side : 1); }

int64_t thin_width(int64_t r) { return (r + kThinWidth - 1) / kThinWidth * kThinWidth; }

// A thin factor: scale * src, or scale * src^T. PackedFactor holds it in the accumulation type, zero-padded to the thin width.
struct Factor {
  const void* src;
  DType dtype;
  int64_t rows, r;
  bool transpose;  // src is [r, rows]
  double scale;
};

class PackedFactor {
 public:
  PackedFactor(const Factor& factor, bool is_double, const CpuHost* host)
      : packed_(host, factor.rows * thin_width(factor.r) * (is_double ? 8 : 4)) {
    PackJob job;
    job.src = factor.src;
    job.src_dtype = factor.dtype;
    job.columns = factor.r;
    job.row_stride = factor.transpose ? 1 : factor.r;
    job.column_stride = factor.transpose ? factor.rows : 1;
    job.width = thin_width(factor.r);
    job.scale = factor.scale;
    job.is_double = is_double;
    job.dst = packed_.data();
    parallel_for(host, factor.rows, grain(job.width), [&](int64_t begin, int64_t end) { kernels().pack(job, begin, end); });
  }
  const void* data() const { return packed_.data(); }

 private:
  Workspace packed_;
};

void contract_rows(const ContractJob& job, const CpuHost* host) {
  parallel_for(host, job.rows, grain(job.columns),
               [&](int64_t begin, int64_t end) { kernels().contract_rows(job, begin, end); });
}

void contract_columns(const ContractJob& job, const CpuHost* host) {
  parallel_for(host, job.columns, grain(job.rows),
               [&](int64_t begin, int64_t end) { kernels().contract_columns(job, begin, end); });
}

void store(const void* src, bool is_double, int64_t rows, int64_t columns, void* dst, DType dtype, bool transpose,
           const CpuHost* host) {
  StoreJob job;
  job.src = src;
  job.rows = rows;
  job.columns = columns;
  job.width = thin_width(columns);
  job.is_double = is_double;
  job.dst = dst;
  job.dst_dtype = dtype;
  job.transpose = transpose;
  parallel_for(host, rows, grain(columns), [&](int64_t begin, int64_t end) { kernels().store(job, begin, end); });
}

ContractJob unmasked(const void* matrix, DType dtype, int64_t rows, int64_t columns, int64_t r, bool is_double) {
  ContractJob job;
  job.rows = rows;
  job.columns = columns;
  job.matrix = matrix;
  job.matrix_dtype = dtype;
  job.width = thin_width(r);
  job.is_double = is_double;
  return job;
}

}  // namespace

Status adapter_grad_lors(const AdapterGradArgs& args, const CpuHost* host) {
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features, r = args.r, width = thin_width(r);
  const bool is_double = args.grad_output_dtype == DType::float64;
  if (is_double != (args.input_dtype == DType::float64))
    return Status::error("adapter_grad needs input and grad_output both in float64 or neither.");
  const int64_t size = is_double ? 8 : 4;
  struct Activation {
    const void* data;
    DType dtype;
    int64_t features;
  };
  // out [second.features, r] = second^T (first factor), or its transpose.
  const auto gradient = [&](const Activation& first, const Factor& factor, const Activation& second, void* out, DType dtype,
                            bool transpose) {
    const PackedFactor packed(factor, is_double, host);
    Workspace projected(host, T * width * size), sum(host, second.features * width * size);
    ContractJob job = unmasked(first.data, first.dtype, T, first.features, r, is_double);
    job.factor = packed.data();
    job.out = projected.data();
    contract_rows(job, host);
    job = unmasked(second.data, second.dtype, T, second.features, r, is_double);
    job.factor = projected.data();
    job.out = sum.data();
    contract_columns(job, host);
    store(sum.data(), is_double, second.features, r, out, dtype, transpose, host);
  };
  const Activation X{args.input, args.input_dtype, K}, dY{args.grad_output, args.grad_output_dtype, N};
  if (args.lora_B_grad)
    gradient(X, {args.lora_A, args.lora_A_dtype, K, r, true, args.scaling}, dY, args.lora_B_grad, args.lora_B_dtype, false);
  if (args.lora_A_grad)
    gradient(dY, {args.lora_B, args.lora_B_dtype, N, r, false, args.scaling}, X, args.lora_A_grad, args.lora_A_dtype, true);
  return {};
}

Status masked_contract(const MaskedContractArgs& args, const CpuHost* host) {
  const int64_t rows = args.rows, K = args.in_features, r = args.r, width = thin_width(r);
  const bool is_double = args.grad_weight_dtype == DType::float64;
  const int64_t size = is_double ? 8 : 4;
  ContractJob job = unmasked(args.grad_weight, args.grad_weight_dtype, rows, K, r, is_double);
  job.mask = args.mask;
  job.kept_where = args.mask ? nullptr : args.weight;
  job.kept_where_size = dtype_size(args.weight_dtype);
  if (args.lora_B_grad) {
    const PackedFactor transposed_A({args.lora_A, args.lora_A_dtype, K, r, true, args.scaling}, is_double, host);
    Workspace sum(host, rows * width * size);
    job.factor = transposed_A.data();
    job.out = sum.data();
    contract_rows(job, host);
    store(sum.data(), is_double, rows, r, args.lora_B_grad, args.lora_B_dtype, false, host);
  }
  if (args.lora_A_sum) {
    const PackedFactor packed_B({args.lora_B, args.lora_B_dtype, rows, r, false, args.scaling}, is_double, host);
    Workspace sum(host, K * width * size);
    job.factor = packed_B.data();
    job.out = sum.data();
    contract_columns(job, host);
    const auto add = [&]<typename Acc>(Acc* total) {
      const Acc* panel = static_cast<const Acc*>(sum.data());
      for (int64_t k = 0; k < K; ++k)
        for (int64_t p = 0; p < r; ++p) total[k * r + p] += panel[k * width + p];
    };
    is_double ? add(static_cast<double*>(args.lora_A_sum)) : add(static_cast<float*>(args.lora_A_sum));
  }
  return {};
}

Status bias_grad(const BiasGradArgs& args, const CpuHost* host) {
  // A column sum is contract_columns with a factor of ones in its first column.
  const int64_t T = args.tokens, N = args.out_features;
  const bool is_double = args.grad_output_dtype == DType::float64;
  const double one = 1.0;
  Workspace ones(host, T * kThinWidth * (is_double ? 8 : 4)), sum(host, N * kThinWidth * (is_double ? 8 : 4));
  PackJob pack_ones;
  pack_ones.src = &one;
  pack_ones.src_dtype = DType::float64;
  pack_ones.columns = 1;
  pack_ones.width = kThinWidth;
  pack_ones.is_double = is_double;
  pack_ones.dst = ones.data();
  kernels().pack(pack_ones, 0, T);
  ContractJob job = unmasked(args.grad_output, args.grad_output_dtype, T, N, 1, is_double);
  job.factor = ones.data();
  job.out = sum.data();
  contract_columns(job, host);
  store(sum.data(), is_double, N, 1, args.bias_grad, args.bias_grad_dtype, false, host);
  return {};
}

}  // namespace lors
