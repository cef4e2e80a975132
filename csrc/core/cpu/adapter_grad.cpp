// SPDX-License-Identifier: Apache-2.0
// The adapter gradients and the bias gradient on the CPU, as matmuls with a thin factor (contract_kernel.h) over dY, X or a
// panel of dY^T X. No sum is split between threads, so results do not depend on the number of threads.
#include <lors/adapter_grad.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "in_pairs.h"
#include "kernels.h"
#include "workspace.h"

namespace lors {

using namespace cpu;

namespace {

constexpr int64_t kGrainElements = 32768;  // elements of the big matrix below which a second thread does not pay

int64_t grain(int64_t other_side) { return 1 + kGrainElements / (other_side > 0 ? other_side : 1); }

int64_t thin_width(int64_t r) { return (r + kThinWidth - 1) / kThinWidth * kThinWidth; }

// A thin factor: src, or src^T. PackedFactor holds it in the accumulation type, or as bfloat16 pairs along its rows,
// zero-padded to the thin width.
struct Factor {
  const void* src;
  DType dtype;
  int64_t rows, r;
  bool transpose;  // src is [r, rows]
};

class PackedFactor {
 public:
  PackedFactor(const Factor& factor, bool is_double, bool pairs, const CpuHost* host)
      : packed_(host, factor.rows * thin_width(factor.r) * (is_double ? 8 : 4)) {
    const int64_t row_stride = factor.transpose ? 1 : factor.r;
    PackJob job;
    job.src = factor.src;
    job.src_dtype = factor.dtype;
    job.columns = factor.r;
    job.row_stride = pairs ? 2 * row_stride : row_stride;
    job.column_stride = factor.transpose ? factor.rows : 1;
    job.pair_stride = pairs ? row_stride : 0;
    job.width = thin_width(factor.r);
    job.is_double = is_double;
    job.dst = packed_.data();
    parallel_for(host, pairs ? factor.rows / 2 : factor.rows, grain(job.width),
                 [&](int64_t begin, int64_t end) { kernels().pack(job, begin, end); });
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

void store(const void* src, int64_t width, double scale, bool is_double, int64_t rows, int64_t columns, void* dst, DType dtype,
           bool transpose, const CpuHost* host) {
  StoreJob job;
  job.src = src;
  job.scale = scale;
  job.rows = rows;
  job.columns = columns;
  job.width = width;
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

// X [T, columns] for the kernels that read tokens in pairs: of an odd number, a copy with a token of zeros behind it.
class EvenTokens {
 public:
  EvenTokens(const void* src, int64_t tokens, int64_t columns, const CpuHost* host)
      : copy_(host, tokens % 2 ? (tokens + 1) * columns * 2 : 0), data_(src) {
    if (tokens % 2 == 0) return;
    auto* copy = static_cast<uint16_t*>(copy_.data());
    std::memcpy(copy, src, size_t(tokens * columns) * 2);
    std::fill_n(copy + tokens * columns, columns, uint16_t(0));
    data_ = copy;
  }
  const uint16_t* data() const { return static_cast<const uint16_t*>(data_); }

 private:
  Workspace copy_;
  const void* data_;
};

}  // namespace

Status adapter_grad_lors(const AdapterGradArgs& args, const CpuHost* host) {
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features, r = args.r, width = thin_width(r);
  if (args.experts.offsets)
    return Status::error("adapter_grad_lors takes one expert on the CPU, and was given offsets; call it for the rows of each.");
  const bool is_double = args.grad_output_dtype == DType::float64;
  if (is_double != (args.input_dtype == DType::float64))
    return Status::error("adapter_grad needs input and grad_output both in float64 or neither.");
  const int64_t size = is_double ? 8 : 4;
  struct Activation {
    const void* data;
    DType dtype;
    int64_t features;
  };
  // out [second.features, r] = s second^T (first factor), or its transpose.
  const auto gradient = [&](const Activation& first, const Factor& factor, const Activation& second, void* out, DType dtype,
                            bool transpose) {
    const bool pairs = first.features % 2 == 0 && in_pairs(kernels(), {first.data, first.dtype, T * first.features},
                                                           {factor.src, factor.dtype, factor.rows * r}, host);
    const PackedFactor packed(factor, is_double, pairs, host);
    Workspace projected(host, T * width * size), sum(host, second.features * width * size);
    ContractJob job = unmasked(first.data, first.dtype, T, pairs ? first.features / 2 : first.features, r, is_double);
    job.pairs = pairs;
    job.factor = packed.data();
    job.out = projected.data();
    contract_rows(job, host);
    job = unmasked(second.data, second.dtype, T, second.features, r, is_double);
    job.factor = projected.data();
    job.out = sum.data();
    contract_columns(job, host);
    store(sum.data(), width, args.scaling, is_double, second.features, r, out, dtype, transpose, host);
  };
  const Activation X{args.input, args.input_dtype, K}, dY{args.grad_output, args.grad_output_dtype, N};
  if (args.lora_B_grad)
    gradient(X, {args.lora_A, args.lora_A_dtype, K, r, true}, dY, args.lora_B_grad, args.lora_B_dtype, false);
  if (args.lora_A_grad)
    gradient(dY, {args.lora_B, args.lora_B_dtype, N, r, false}, X, args.lora_A_grad, args.lora_A_dtype, true);
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
    const PackedFactor transposed_A({args.lora_A, args.lora_A_dtype, K, r, true}, is_double, false, host);
    Workspace sum(host, rows * width * size);
    job.factor = transposed_A.data();
    job.out = sum.data();
    contract_rows(job, host);
    store(sum.data(), width, args.scaling, is_double, rows, r, args.lora_B_grad, args.lora_B_dtype, false, host);
  }
  if (args.lora_A_sum) {
    const PackedFactor packed_B({args.lora_B, args.lora_B_dtype, rows, r, false}, is_double, false, host);
    Workspace sum(host, K * width * size);
    job.factor = packed_B.data();
    job.out = sum.data();
    contract_columns(job, host);
    const auto add = [&]<typename Acc>(Acc* total) {
      const Acc* panel = static_cast<const Acc*>(sum.data());
      for (int64_t k = 0; k < K; ++k)
        for (int64_t p = 0; p < r; ++p) total[k * r + p] += Acc(args.scaling) * panel[k * width + p];
    };
    is_double ? add(static_cast<double*>(args.lora_A_sum)) : add(static_cast<float*>(args.lora_A_sum));
  }
  return {};
}

// G = dY^T X is a merge's B A without a weight, its rank the tokens: X is packed as lora_A is, dY^T as lora_B.
Status adapter_grad_exact(const AdapterGradExactArgs& args, const CpuHost* host, bool* done) {
  const KernelTable& table = kernels();
  const int64_t T = args.tokens, N = args.out_features, K = args.in_features, r = args.r;
  *done = in_pairs(table, {args.input, args.input_dtype, T * K}, {args.grad_output, args.grad_output_dtype, T * N}, host);
  if (!*done) return {};
  const int64_t pairs = (T + 1) / 2, panel = table.merge_panel, panels = (K + panel - 1) / panel;
  const Workspace X(host, panels * pairs * panel * 4), dY(host, N * pairs * 4);
  {
    const EvenTokens input(args.input, T, K, host), grad_output(args.grad_output, T, N, host);
    PackJob job;
    job.row_stride = 2 * K;
    job.column_stride = 1;
    job.pair_stride = K;
    job.width = panel;
    parallel_for(host, panels, grain(panel * T), [&](int64_t begin, int64_t end) {
      PackJob one = job;
      for (int64_t q = begin; q < end; ++q) {
        one.src = input.data() + q * panel;
        one.columns = std::min(panel, K - q * panel);
        one.dst = static_cast<float*>(X.data()) + q * pairs * panel;
        table.pack(one, 0, pairs);
      }
    });
    job.src = grad_output.data();
    job.columns = job.width = pairs;
    job.row_stride = 1;
    job.column_stride = 2 * N;
    job.pair_stride = N;
    job.dst = dY.data();
    parallel_for(host, N, grain(T), [&](int64_t begin, int64_t end) { table.pack(job, begin, end); });
  }
  // 4 MiB stay in the last-level cache between the matmul and the contraction.
  const int64_t panel_rows = std::clamp<int64_t>((1 << 20) / K, 1, N);
  const Workspace gradient(host, panel_rows * K * 4);
  std::vector<float> lora_A_sum(size_t(args.lora_A_grad ? K * r : 0));
  MergeJob product;
  product.in_features = K;
  product.r = pairs;
  product.pairs = true;
  product.lora_A = X.data();
  product.merged = gradient.data();
  for (int64_t begin = 0; begin < N; begin += panel_rows) {
    const auto row = [&](const void* matrix, int64_t bytes) { return static_cast<const char*>(matrix) + begin * bytes; };
    MaskedContractArgs contract;
    contract.rows = std::min(panel_rows, N - begin);
    product.lora_B = row(dY.data(), pairs * 4);
    parallel_for(host, contract.rows, grain(K * pairs),
                 [&](int64_t first, int64_t last) { table.multiply(product, first, last); });
    contract.in_features = K;
    contract.r = r;
    contract.grad_weight = gradient.data();
    contract.weight = args.mask ? nullptr : row(args.weight, K * dtype_size(args.weight_dtype));
    contract.weight_dtype = args.weight_dtype;
    contract.mask = args.mask ? args.mask + begin * mask_words(K) : nullptr;
    contract.lora_A = args.lora_A;
    contract.lora_A_dtype = args.lora_A_dtype;
    contract.lora_B = row(args.lora_B, r * dtype_size(args.lora_B_dtype));
    contract.lora_B_dtype = args.lora_B_dtype;
    contract.scaling = args.scaling;
    contract.lora_A_sum = args.lora_A_grad ? lora_A_sum.data() : nullptr;
    contract.lora_B_grad =
        args.lora_B_grad ? const_cast<char*>(row(args.lora_B_grad, r * dtype_size(args.lora_B_dtype))) : nullptr;
    if (Status status = masked_contract(contract, host); !status.ok()) return status;
  }
  if (args.lora_A_grad) store(lora_A_sum.data(), r, 1.0, false, K, r, args.lora_A_grad, args.lora_A_dtype, true, host);
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
  store(sum.data(), kThinWidth, 1.0, is_double, N, 1, args.bias_grad, args.bias_grad_dtype, false, host);
  return {};
}

}  // namespace lors
