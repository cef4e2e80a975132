// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU (operators.h): threads and memory are torch's, the large matmuls are torch's mm, called below the
// dispatcher (aoti_torch_cpu_*) so that autocast and autograd cannot intercept them.
#include <lors/compress.h>
#include <lors/cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>

#include "build_info.h"
#include "cpu_scratch.h"
#include "grouped_operators.h"

namespace lors::binding {
namespace {

// The core runs on torch's thread pool, so that torch's settings apply.
void run_on_torch_threads(int64_t count, int64_t grain, CpuHost::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

constexpr CpuHost kTorch{run_on_torch_threads, take_scratch, return_scratch};

// Bits that are set. Every call with a bitmap counts all of them: by sums that the compiler makes vectors of, because baseline
// x86-64 has no instruction for it.
int64_t count_bits(const uint32_t* words, int64_t count) {
  constexpr int64_t kBlock = 1024;
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    uint32_t sum = 0;
    for (int64_t w = first; w < std::min(count, first + kBlock); ++w) {
      uint32_t x = words[w];
      x -= x >> 1 & 0x55555555;
      x = (x & 0x33333333) + (x >> 2 & 0x33333333);
      x = (x + (x >> 4)) & 0x0f0f0f0f;
      x += x >> 8;
      sum += (x + (x >> 16)) & 63;
    }
    total += sum;
  }
  return total;
}

// Where the values of rows [begin, end) of a bitmap begin, beginning with `first`, and where they end. `mask`: its bits, int32
// [N, ceil(K/32)]; a row is a multiple of `unit`. Refuses bits beyond K.
std::vector<int64_t> row_offsets_of(const char* op, const Tensor& mask, int64_t K, int64_t begin, int64_t end,
                                    int64_t first = 0, int64_t unit = 1) {
  const int64_t words = mask.size(1);
  const uint32_t beyond = K % 32 ? ~uint32_t{0} << (K % 32) : 0;
  std::vector<int64_t> offsets{first};
  offsets.reserve(static_cast<size_t>(end - begin) + 1);
  const uint32_t* row = bits(mask) + begin * words;
  for (int64_t n = begin; n < end; ++n, row += words) {
    const int64_t count = count_bits(row, words);
    check(words == 0 || (row[words - 1] & beyond) == 0, "lors::", op, ": the mask has bits beyond column ", K, " in row ", n,
          "; pass the tensors of one SparseWeight.");
    offsets.push_back(offsets.back() + (count + unit - 1) / unit * unit);
  }
  return offsets;
}

// Which rows are whose, read: the experts that have any, in order.
struct CpuGroups {
  struct Group {
    int64_t expert, begin, count;
  };

  CpuGroups(const char* op, const Tensor& offsets, std::optional<Tensor> given_rows, int64_t S, int64_t T)
      : rows(std::move(given_rows)) {
    const auto* ends = static_cast<const int32_t*>(offsets.const_data_ptr());
    for (int64_t e = 0; e < offsets.size(0); ++e) {
      check(ends[e] >= end && ends[e] <= S, "lors::", op, ": offsets[", e, "] is ", ends[e], "; it must be at least ", end,
            ", where the expert before it ends, and at most ", S, ", the number of rows.");
      if (ends[e] > end) groups.push_back({e, end, ends[e] - end});
      end = ends[e];
    }
    if (!rows) return;
    std::vector<int64_t> occurs(static_cast<size_t>(T));
    const auto* tokens = static_cast<const int32_t*>(rows->const_data_ptr());
    for (int64_t i = 0; i < S; ++i) {
      check(tokens[i] >= 0 && tokens[i] < T, "lors::", op, ": rows[", i, "] is ", tokens[i],
            "; it must be at least 0 and below ", T, ", the number of rows of input.");
      ++occurs[static_cast<size_t>(tokens[i])];
    }
    for (int64_t t = 0; t < T; ++t)
      check(occurs[static_cast<size_t>(t)] * T == S, "lors::", op, ": rows has row ", t, " of input ",
            occurs[static_cast<size_t>(t)], " times; each of the ", T, " must be there equally often, ", S, " times in all.");
  }

  CpuGroups by_row() const {
    CpuGroups same(*this);
    same.rows = std::nullopt;
    return same;
  }

  std::vector<Group> groups;
  int64_t end = 0;  // of the last expert's rows
  std::optional<Tensor> rows;
};

// Rows [begin, begin + count) of a row-major tensor of any number of dimensions, as a matrix of its own: in a thread of torch's
// pool autograd and inference mode are not those of the call, and a view of the call's tensors could not be written to.
Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  const int64_t columns = t.size(t.dim() - 1);
  return torch::stable::from_blob(const_cast<void*>(at(t, begin * columns)), {count, columns}, {columns, 1}, t.device(),
                                  t.scalar_type());
}

Tensor rows_of(const Tensor& t, const CpuGroups::Group& group) { return rows_of(t, group.begin, group.count); }

// The same of the input, gathered where `rows` say so.
Tensor input_of(const Tensor& input, const CpuGroups::Group& group, const std::optional<Tensor>& rows) {
  if (!rows) return rows_of(input, group);
  Tensor gathered = empty(input, {group.count, input.size(1)}, input.scalar_type());
  const auto* tokens = static_cast<const int32_t*>(rows->const_data_ptr()) + group.begin;
  const auto bytes = static_cast<size_t>(input.size(1) * element_bytes(input.scalar_type()));
  auto* to = static_cast<char*>(gathered.mutable_data_ptr());
  for (int64_t i = 0; i < group.count; ++i, to += bytes) std::memcpy(to, at(input, tokens[i] * input.size(1)), bytes);
  return gathered;
}

// work(group) for each group: where there are many, each by one thread, the largest first, else one after the other by all
// threads.
template <typename Work>
void for_each_group(const CpuGroups& groups, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || static_cast<int64_t>(groups.groups.size()) < 2 * threads) {
    for (const CpuGroups::Group& group : groups.groups) work(group);
    return;
  }
  std::vector<CpuGroups::Group> order = groups.groups;
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.count > b.count; });
  std::atomic<size_t> next{0};
  std::exception_ptr problem;
  std::mutex guard;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (size_t i = next++; i < order.size(); i = next++) work(order[i]);
    } catch (...) {
      const std::lock_guard lock(guard);
      problem = std::current_exception();
    }
  });
  if (problem) std::rethrow_exception(problem);
}

struct Cpu {
  using Groups = CpuGroups;

  explicit Cpu(const Tensor&) {}

  const CpuHost* host() const { return &kTorch; }
  static constexpr auto allocate = take_scratch;
  static constexpr auto release = return_scratch;

  // See cpu_multiplies_natively.
  static ScalarType matmul_dtype(ScalarType activation) {
    if (activation == ScalarType::BFloat16 && !cpu_multiplies_natively(DType::bfloat16)) return ScalarType::Float;
    if (activation == ScalarType::Half && !cpu_multiplies_natively(DType::float16)) return ScalarType::Float;
    return activation;
  }

  // So many that a thread's share stays in the caches until it is multiplied: with 1, 2, 3 and 8 MiB the forward of 16 bfloat16
  // tokens from 2:4 took 1.11, 1.03, 1.07 and 1.30 times that of a dense weight (Zen 4, 4096 x 4096, one thread).
  static int64_t merged_rows(int64_t K, ScalarType dtype) {
    constexpr int64_t kBytesOfThread = 2 << 20;
    return int64_t(torch::stable::get_num_threads()) * kBytesOfThread / std::max<int64_t>(K * element_bytes(dtype), 1);
  }

  static void matmul(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt) {
    if (bias) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
    }
  }

  static bool prefers_fused_linear(const Tensor& activation, const AdaptedWeight<Cpu>& adapted, bool input_gradient,
                                   bool is_plain) {
    if (adapted.weight.scalar_type() == ScalarType::Double) return false;
    if (adapted.is_quantized() && activation.scalar_type() == ScalarType::Half) return false;  // it has no kernels for that
    return cpu_prefers_fused_linear(activation.size(0), input_gradient,
                                    matmul_dtype(activation.scalar_type()) == ScalarType::Float, is_plain);
  }

  static ScalarType fused_output_dtype(ScalarType) { return ScalarType::Float; }
  static ScalarType fused_bias_dtype(const Tensor&) { return ScalarType::Float; }

  static constexpr bool kSparseMatmul = false;
  static constexpr bool kMixedActivations = true;

  static bool exact_at_once(const Tensor& grad_output, const Tensor& input, const AdaptedWeight<Cpu>& adapted,
                            const uint32_t* kept, Tensor* grad_lora_A, Tensor* grad_lora_B) {
    if (grad_output.scalar_type() != ScalarType::BFloat16 || input.scalar_type() != ScalarType::BFloat16) return false;
    const Tensor dY = row_major(grad_output), X = row_major(input);
    AdapterGradExactArgs args;
    adapted.describe_gradients(args, dY, X, grad_lora_A, grad_lora_B, kept);
    bool done = false;
    check_status(lors::adapter_grad_exact(args, adapted.backend.host(), &done));
    return done;
  }

  static ScalarType gradient_dtype(ScalarType, ScalarType accumulation) { return accumulation; }
  static void gradient_matmul(Tensor& out, const Tensor& a, const Tensor& b) { matmul(out, a, b); }
  // 4 MiB of float32 stay in the last-level cache between the matmul and the contraction.
  static int64_t gradient_panel_rows(int64_t N, int64_t K, ScalarType) {
    constexpr int64_t kPanelElements = 1 << 20;
    return std::clamp<int64_t>(kPanelElements / K, 1, N);
  }

  // Of rows [begin, begin + rows): those that a call reads. What they begin with is known of row 0 alone, and of the others
  // only that it lies among the values.
  static void check_offsets(const char* op, int64_t count, const Tensor& mask, const Tensor& row_offsets, int64_t K,
                            int64_t per_element, int64_t begin, int64_t rows) {
    const auto* given = static_cast<const int64_t*>(row_offsets.const_data_ptr()) + begin;
    const std::vector<int64_t> wanted =
        row_offsets_of(op, mask, K, begin, begin + rows, begin == 0 ? 0 : std::max<int64_t>(given[0], 0), per_element);
    const int64_t row = std::mismatch(wanted.begin(), wanted.end(), given).first - wanted.begin();
    check(row == int64_t(wanted.size()), "lors::", op, ": row_offsets disagrees with the mask's bits at row ", begin + row,
          "; pass the tensors of one SparseWeight.");
    const bool is_last = begin + rows == mask.size(0);
    check(is_last ? wanted.back() == count * per_element : wanted.back() <= count * per_element, "lors::", op,
          ": the mask keeps ", wanted.back(), " values and ", count * per_element,
          " are given; pass the tensors of one SparseWeight.");
  }

  void bias_grad(const Tensor& grad_output, Tensor& grad_bias) const {
    const Tensor dY = row_major(grad_output);
    BiasGradArgs args;
    args.tokens = dY.size(0);
    args.out_features = dY.size(1);
    args.grad_output = dY.const_data_ptr();
    args.grad_output_dtype = dtype_of(dY);
    args.bias_grad = grad_bias.mutable_data_ptr();
    args.bias_grad_dtype = dtype_of(grad_bias);
    check_status(lors::bias_grad(args, host()));
  }

  static void grouped_multiply(Tensor& out, const Tensor& activation, const Groups& groups, const AdaptedWeight<Cpu>& adapted,
                               const std::optional<Tensor>& bias, bool input_gradient, const std::optional<Tensor>& merged) {
    const bool is_stored = merged && merged->scalar_type() == activation.scalar_type();
    const AdaptedWeight<Cpu> weight = is_stored ? AdaptedWeight<Cpu>(adapted, *merged) : adapted;
    const std::optional<Tensor> shared = is_stored ? std::nullopt : merged;
    std::optional<Tensor> addends;
    if (bias) addends = row_major(*bias);
    for_each_group(groups, [&](const Groups::Group& group) {
      std::optional<Tensor> addend;
      if (addends) addend = torch::stable::flatten(rows_of(*addends, group.expert, 1));
      Tensor part = rows_of(out, group);
      const Tensor made =
          weight.expert(group.expert).multiply(input_of(activation, group, groups.rows), addend, input_gradient, shared, part);
      if (made.const_data_ptr() != part.const_data_ptr()) torch::stable::copy_(part, made);
    });
    if (groups.end < out.size(0)) {
      Tensor rest = slice(out, 0, groups.end, out.size(0) - groups.end);
      torch::stable::zero_(rest);
    }
  }

  static void grouped_adapter_gradients(const Tensor& grad_output, const Tensor& input, const Groups& groups,
                                        const AdaptedWeight<Cpu>& adapted, bool exact, Tensor* grad_lora_A,
                                        Tensor* grad_lora_B) {
    if (grad_lora_A) torch::stable::zero_(*grad_lora_A);
    if (grad_lora_B) torch::stable::zero_(*grad_lora_B);
    const int64_t N = grad_output.size(1), r = adapted.r();
    for_each_group(groups, [&](const Groups::Group& group) {
      std::optional<Tensor> dA, dB;
      if (grad_lora_A) dA = rows_of(*grad_lora_A, group.expert * r, r);
      if (grad_lora_B) dB = rows_of(*grad_lora_B, group.expert * N, N);
      adapter_gradients(rows_of(grad_output, group), input_of(input, group, groups.rows), adapted.expert(group.expert), exact,
                        dA ? &*dA : nullptr, dB ? &*dB : nullptr);
    });
  }

  void grouped_bias_gradient(const Tensor& grad_output, const Groups& groups, Tensor& grad_bias) const {
    torch::stable::zero_(grad_bias);
    for (const Groups::Group& group : groups.groups) {
      Tensor of_expert = torch::stable::select(grad_bias, 0, group.expert);
      bias_grad(slice(grad_output, 0, group.begin, group.count), of_expert);
    }
  }
};

Tensor compress(const Tensor& weight, const Tensor& mask) {
  check(weight.dim() == 2, "lors::compress: weight has shape ", shape(weight), "; it must be [out_features, in_features].");
  check_floating("compress", "weight", weight);
  check_bits("compress", "mask", mask, weight.size(0), weight.size(1));
  check_same_device("compress", "mask", mask, weight);
  const Tensor dense = row_major(weight), kept = row_major(mask);
  const std::vector<int64_t> row_offsets = row_offsets_of("compress", kept, weight.size(1), 0, weight.size(0));
  Tensor values = empty(weight, {row_offsets.back()}, weight.scalar_type());
  CompressArgs args;
  args.out_features = weight.size(0);
  args.in_features = weight.size(1);
  args.weight = dense.const_data_ptr();
  args.dtype = dtype_of(weight);
  args.mask = bits(kept);
  args.row_offsets = row_offsets.data();
  args.values = values.mutable_data_ptr();
  check_status(lors::compress(args, &kTorch));
  return values;
}

// What the CPU kernels run with, as JSON members. A wrong environment variable must not keep the package from being imported:
// its sentence is a member instead, and the first call refuses it.
std::string cpu_members() {
  const char *capability = "", *bfloat16 = "", *float16 = "";
  std::string problem;
  try {
    capability = cpu_capability();
    bfloat16 = cpu_multiplies_natively(DType::bfloat16) ? "bfloat16" : "float32";
    float16 = cpu_multiplies_natively(DType::float16) ? "float16" : "float32";
  } catch (const std::exception& error) {
    problem = error.what();
    for (char& c : problem)
      if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ') c = '?';
  }
  std::ostringstream out;
  out << "\"cpu_capability\": \"" << capability << "\", \"cpu_product_bfloat16\": \"" << bfloat16
      << "\", \"cpu_product_float16\": \"" << float16 << "\", \"cpu_problem\": \"" << problem << '"';
  return out.str();
}

std::string build_info() {
  std::ostringstream out;
  out << "{\"version\": \"" << LORS_VERSION << "\", \"compiler\": \"" << LORS_COMPILER << "\", \"cuda_version\": \""
      << LORS_CUDA_VERSION << "\", \"cuda_archs\": \"" << LORS_CUDA_ARCHS << "\", " << cpu_members() << "}";
  return out.str();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lors, CPU, m) {
  Operators<Cpu>::implement(m);
  GroupedOperators<Cpu>::implement(m);
  m.impl("compress", TORCH_BOX(&explained<&compress>));
}

STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("release_scratch", TORCH_BOX(&release_scratch));
}

}  // namespace lors::binding
