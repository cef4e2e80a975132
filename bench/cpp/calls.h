// SPDX-License-Identifier: Apache-2.0
// What is benchmarked: every kernel of the core as a list of operands, a floor (bytes, operations) and a function that calls
// it. The same list serves both devices; only the host's type differs. Knows nothing of time.
#pragma once

#include <lors/adapter_grad.h>
#include <lors/fused_linear.h>
#include <lors/merge.h>
#include <lors/sparse24.h>

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace lors::bench {

struct Problem {
  int64_t tokens = 0;        // T
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  int64_t r = 0;
  DType dtype = DType::float32;  // of every floating-point operand
};

// What an operand holds before the first call.
enum class Fill {
  normal,     // random, of the problem's dtype
  sparse,     // the same, half of it zeros
  poison,     // an output: every bit set, which is NaN in every floating-point type
  sum,        // float32 zeros that the call adds to
  codes,      // bytes of 2:4 metadata, two kept in every group
  half_bits,  // 32-bit words of a mask, half of each kept
  offsets     // int64, multiples of `step`
};

struct Operand {
  int64_t count = 0;
  DType dtype = DType::float32;
  Fill fill = Fill::normal;
  int64_t element_bytes = 0;  // 0: the dtype's
  int64_t step = 0;           // of offsets

  int64_t element_size() const { return element_bytes ? element_bytes : dtype_size(dtype); }
  int64_t bytes() const { return count * element_size(); }
};

// `Host` is `const CpuHost*` or `CudaHost`.
template <typename Host>
struct Call {
  std::string name;
  std::vector<Operand> operands;
  double flop = 0;                                              // the least the formula takes
  std::function<Status(void* const* operands, Host host)> run;  // queues one call on one set of operands

  // The floor: each operand read or written once; a sum is read and written.
  int64_t floor_bytes() const {
    int64_t bytes = 0;
    for (const Operand& operand : operands) bytes += operand.bytes() * (operand.fill == Fill::sum ? 2 : 1);
    return bytes;
  }
};

namespace detail {

inline Operand floats(int64_t count, const Problem& p, Fill fill = Fill::normal) { return {count, p.dtype, fill}; }
inline Operand codes(const Problem& p) {
  return {p.out_features * sparse24_metadata_bytes(p.in_features), p.dtype, Fill::codes, 1};
}

// Fills in what MergeArgs and FusedLinearArgs have in common.
template <typename Args>
void describe(Args& args, const Problem& p, const void* weight, const void* lora_A, const void* lora_B) {
  args.out_features = p.out_features;
  args.in_features = p.in_features;
  args.r = p.r;
  args.weight = weight;
  args.lora_A = lora_A;
  args.lora_B = lora_B;
  args.weight_dtype = args.lora_A_dtype = args.lora_B_dtype = args.round_to = p.dtype;
  args.scaling = 0.75;
}

inline void describe(AdapterGradArgs& args, const Problem& p, void* const* o) {
  args.tokens = p.tokens;
  args.out_features = p.out_features;
  args.in_features = p.in_features;
  args.r = p.r;
  args.grad_output = o[0];
  args.input = o[1];
  args.lora_A = o[2];
  args.lora_B = o[3];
  args.lora_A_grad = o[4];
  args.lora_B_grad = o[5];
  args.grad_output_dtype = args.input_dtype = args.lora_A_dtype = args.lora_B_dtype = p.dtype;
  args.scaling = 0.75;
}

inline std::vector<Operand> adapter_grad_operands(const Problem& p) {
  const int64_t T = p.tokens, N = p.out_features, K = p.in_features, r = p.r;
  return {floats(T * N, p),
          floats(T * K, p),
          floats(r * K, p),
          floats(N * r, p),
          floats(r * K, p, Fill::poison),
          floats(N * r, p, Fill::poison)};
}

}  // namespace detail

template <typename Host>
Call<Host> merge_call(const Problem& p) {
  const int64_t N = p.out_features, K = p.in_features, r = p.r;
  Call<Host> call;
  call.name = "merge";
  call.operands = {detail::floats(N * K, p, Fill::sparse), detail::floats(r * K, p), detail::floats(N * r, p),
                   detail::floats(N * K, p, Fill::poison)};
  call.flop = 2.0 * N * K * r;
  call.run = [p](void* const* o, Host host) {
    MergeArgs args;
    detail::describe(args, p, o[0], o[1], o[2]);
    args.merged = o[3];
    args.merged_dtype = p.dtype;
    return merge(args, host);
  };
  return call;
}

// The compressed layouts keep half of the weights. K is a multiple of 32.
template <typename Host>
Call<Host> merge_from_sparse24_call(const Problem& p) {
  const int64_t N = p.out_features, K = p.in_features, r = p.r;
  Call<Host> call;
  call.name = "merge_from_sparse24";
  call.operands = {detail::floats(N * K / 2, p), detail::codes(p), detail::floats(r * K, p), detail::floats(N * r, p),
                   detail::floats(N * K, p, Fill::poison)};
  call.flop = 2.0 * N * K * r;
  call.run = [p](void* const* o, Host host) {
    MergeArgs args;
    detail::describe(args, p, o[0], o[2], o[3]);
    args.weight_layout = Layout::sparse24;
    args.metadata = static_cast<const uint8_t*>(o[1]);
    args.merged = o[4];
    args.merged_dtype = p.dtype;
    return merge(args, host);
  };
  return call;
}

template <typename Host>
Call<Host> merge_from_bitmap_call(const Problem& p) {
  const int64_t N = p.out_features, K = p.in_features, r = p.r;
  Call<Host> call;
  call.name = "merge_from_bitmap";
  call.operands = {detail::floats(N * K / 2, p),
                   {N * mask_words(K), p.dtype, Fill::half_bits, 4},
                   {N + 1, p.dtype, Fill::offsets, 8, K / 2},
                   detail::floats(r * K, p),
                   detail::floats(N * r, p),
                   detail::floats(N * K, p, Fill::poison)};
  call.flop = 2.0 * N * K * r;
  call.run = [p](void* const* o, Host host) {
    MergeArgs args;
    detail::describe(args, p, o[0], o[3], o[4]);
    args.weight_layout = Layout::bitmap;
    args.mask = static_cast<const uint32_t*>(o[1]);
    args.row_offsets = static_cast<const int64_t*>(o[2]);
    args.merged = o[5];
    args.merged_dtype = p.dtype;
    return merge(args, host);
  };
  return call;
}

template <typename Host>
Call<Host> sparse24_merge_call(const Problem& p) {
  const int64_t N = p.out_features, K = p.in_features, r = p.r;
  Call<Host> call;
  call.name = "sparse24_merge";
  call.operands = {detail::floats(N * K / 2, p), detail::codes(p), detail::floats(r * K, p), detail::floats(N * r, p),
                   detail::floats(N * K / 2, p, Fill::poison)};
  call.flop = 1.0 * N * K * r;  // the kept half; the vectors of the kernel compute all
  call.run = [p](void* const* o, Host host) {
    MergeArgs args;
    detail::describe(args, p, o[0], o[2], o[3]);
    args.weight_layout = args.merged_layout = Layout::sparse24;
    args.metadata = static_cast<const uint8_t*>(o[1]);
    args.merged = o[4];
    args.merged_dtype = p.dtype;
    return merge(args, host);
  };
  return call;
}

template <typename Host>
Call<Host> adapter_grad_lors_call(const Problem& p) {
  Call<Host> call;
  call.name = "adapter_grad_lors";
  call.operands = detail::adapter_grad_operands(p);
  call.flop = 4.0 * p.tokens * p.r * (p.out_features + p.in_features);
  call.run = [p](void* const* o, Host host) {
    AdapterGradArgs args;
    detail::describe(args, p, o);
    return adapter_grad_lors(args, host);
  };
  return call;
}

template <typename Host>
Call<Host> masked_contract_call(const Problem& p) {
  const int64_t N = p.out_features, K = p.in_features, r = p.r;
  Call<Host> call;
  call.name = "masked_contract";
  call.operands = {{N * K, DType::float32, Fill::normal, 0},
                   detail::floats(N * K, p, Fill::sparse),
                   detail::floats(r * K, p),
                   detail::floats(N * r, p),
                   {K * r, DType::float32, Fill::sum, 0},
                   detail::floats(N * r, p, Fill::poison)};
  call.flop = 4.0 * N * K * r;
  call.run = [p](void* const* o, Host host) {
    MaskedContractArgs args;
    args.rows = p.out_features;
    args.in_features = p.in_features;
    args.r = p.r;
    args.grad_weight = o[0];
    args.weight = o[1];
    args.lora_A = o[2];
    args.lora_B = o[3];
    args.weight_dtype = args.lora_A_dtype = args.lora_B_dtype = p.dtype;
    args.scaling = 0.75;
    args.lora_A_sum = o[4];
    args.lora_B_grad = o[5];
    return masked_contract(args, host);
  };
  return call;
}

template <typename Host>
Call<Host> fused_linear_call(const Problem& p, bool input_gradient) {
  const int64_t T = p.tokens, N = p.out_features, K = p.in_features, r = p.r;
  // As its header says: the CPU writes float32, CUDA the activation's dtype.
  const DType output = std::is_same_v<Host, CudaHost> ? p.dtype : DType::float32;
  Call<Host> call;
  call.name = input_gradient ? "fused_linear_input_gradient" : "fused_linear";
  call.operands = {detail::floats(T * (input_gradient ? N : K), p),
                   detail::floats(N * K, p, Fill::sparse),
                   detail::floats(r * K, p),
                   detail::floats(N * r, p),
                   {T * (input_gradient ? K : N), output, Fill::poison, 0}};
  call.flop = 2.0 * T * N * K + 2.0 * N * K * r;
  call.run = [p, input_gradient, output](void* const* o, Host host) {
    FusedLinearArgs args;
    detail::describe(args, p, o[1], o[2], o[3]);
    args.tokens = p.tokens;
    args.input_gradient = input_gradient;
    args.activation = o[0];
    args.activation_dtype = p.dtype;
    args.output = o[4];
    args.output_dtype = output;
    return fused_linear(args, host);
  };
  return call;
}

// Every call of one problem. Those that do not depend on the tokens come with the first of several token counts alone.
template <typename Host>
std::vector<Call<Host>> calls_of(const Problem& p, bool first_tokens) {
  std::vector<Call<Host>> calls;
  if (first_tokens) {
    calls = {merge_call<Host>(p), masked_contract_call<Host>(p)};
    for (const auto& call : {merge_from_sparse24_call<Host>, merge_from_bitmap_call<Host>, sparse24_merge_call<Host>})
      calls.push_back(call(p));
  }
  calls.push_back(adapter_grad_lors_call<Host>(p));
  for (const bool input_gradient : {false, true}) calls.push_back(fused_linear_call<Host>(p, input_gradient));
  return calls;
}

}  // namespace lors::bench
