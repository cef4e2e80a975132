// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels. kernels.cpp is compiled once per instruction set (baseline, AVX2, AVX-512, AVX-512 with bfloat16)
// and fills one table each; dispatch.cpp picks the best one that this processor supports. Everything with an inner loop is
// behind this table; the .cpp files of the families (merge.cpp, adapter_grad.cpp) check, pack and divide the work between
// threads.
#pragma once

#include <lors/cpu.h>
#include <lors/quantization.h>
#include <lors/random.h>

namespace lors::cpu {

// The accumulation type is float64 where any big operand is, else float32. Arrays called Acc below have that type.

// Packs a small matrix into Acc: dst[j, i] = scale * src[i * row_stride + j * column_stride], width zero-padded to `width`.
struct PackJob {
  const void* src = nullptr;
  DType src_dtype = DType::float32;
  int64_t columns = 0;                        // columns of dst that come from src
  int64_t row_stride = 0, column_stride = 0;  // of src, in elements, along dst's rows and columns
  int64_t width = 0;                          // columns of dst
  double scale = 1.0;
  bool is_double = false;   // Acc
  void* dst = nullptr;      // Acc [rows, width]
  int64_t pair_stride = 0;  // not 0: dst has bfloat16 pairs instead, an element of src and the one this far behind it, unscaled
};

// The grid of a quantised weight (lors/quantization.h), its scales and zero points in float32 [N, groups]: those of column k
// are number k >> shift of a row.
struct GridSteps {
  Grid grid = Grid::none;  // none: the weight holds values
  const float *scales = nullptr, *zeros = nullptr;
  int64_t groups = 0;
  int shift = 0;
  int64_t requantize_steps = 0, dither_seed = -1, first_row = 0;  // as in Quantization
};

// Where both adapters are bfloat16 and the processor multiplies pairs of such numbers (bfloat16_pairs.h), an Acc element of
// theirs is a pair of neighbouring ranks.
struct MergeJob {
  int64_t in_features = 0, r = 0;
  Layout weight_layout = Layout::dense, merged_layout = Layout::dense;
  const void* weight = nullptr;  // as in MergeArgs, also of the next three
  DType weight_dtype = DType::float32;
  const uint32_t* mask = nullptr;     // [N, ceil(K/32)] or null
  const uint8_t* metadata = nullptr;  // 2:4: [N, ceil(K/8)]
  int64_t* cursors = nullptr;         // bitmap: [N], row_offsets to begin with; how far each row's values are used up
  int64_t value_count = 0;            // bitmap: row_offsets[N]
  GridSteps steps;                    // weight_dtype is not read where it has a grid
  bool pairs = false;                 // r counts pairs
  const void* lora_A = nullptr;       // Acc [ceil(K/panel), r, panel], zero-padded
  const void* lora_B = nullptr;       // Acc [N, r], already times scaling unless in pairs
  float scaling = 1.0f;               // of pairs
  void* merged = nullptr;             // as in MergeArgs
  DType merged_dtype = DType::float32, round_to = DType::float32;
  bool is_double = false;
};

// What is done to rows that `merge` has left in Acc, unrounded: random numbers, or a place on the weight's grid, and rounding.
struct DrawJob {
  int64_t first_row = 0, rows = 0, in_features = 0;
  Draws draws;
  GridSteps steps;                   // of a weight that is requantised
  const uint32_t* kept = nullptr;    // bits [rows, ceil(K/32)] of these rows: where noise is added
  const void* kept_where = nullptr;  // where `kept` is null: [rows, K], kept where nonzero
  int64_t kept_where_size = 0;       // bytes of one element of kept_where
  const void* src = nullptr;         // Acc [rows, K]
  void* dst = nullptr;               // [rows, K], or src itself where Acc is its type
  DType dst_dtype = DType::float32, round_to = DType::float32;
};

// A matrix S [rows, columns], optionally masked, times a thin one of `width` columns:
//   contract_rows     out[i, :] = sum_j S[i, j] factor[j, :]        contract_columns  out[j, :] = sum_i S[i, j] factor[i, :]
struct ContractJob {
  int64_t rows = 0, columns = 0;
  const void* matrix = nullptr;  // S [rows, columns] row-major
  DType matrix_dtype = DType::float32;
  const uint32_t* mask = nullptr;    // bits [rows, ceil(columns/32)], 1 = kept
  const void* kept_where = nullptr;  // [rows, columns]: kept where nonzero; used when mask is null; both null: all kept
  int64_t kept_where_size = 0;       // bytes of one element of kept_where
  const void* factor = nullptr;      // Acc [columns or rows, width]
  void* out = nullptr;               // Acc [rows or columns, width], overwritten
  int64_t width = 0;                 // r rounded up to kThinWidth
  bool is_double = false;
  bool pairs = false;  // contract_rows: an Acc element of S and of factor is a bfloat16 pair along j; columns counts pairs
};

inline constexpr int64_t kThinWidth = 16;

// dst = scale * src rounded once, a [rows, columns] Acc matrix (row stride `width`) to a row-major matrix or to its transpose.
struct StoreJob {
  const void* src = nullptr;  // Acc [rows, width]
  double scale = 1.0;
  int64_t rows = 0, columns = 0, width = 0;
  bool is_double = false;
  void* dst = nullptr;  // [rows, columns], or [columns, rows] if transpose
  DType dst_dtype = DType::float32;
  bool transpose = false;
};

// fused_linear: out [tokens, columns] = activation [tokens, depth] * operand [depth, columns], where the operand is merged^T
// (columns = N, depth = K) or, for the input gradient, merged (columns = K, depth = N).
struct FusedJob {
  int64_t tokens = 0, out_features = 0;
  bool input_gradient = false;
  const float* activation = nullptr;     // packed by pack_activation
  MergeJob weight;                       // its panels are fused_columns wide; neither cursors nor a result
  const int64_t* row_offsets = nullptr;  // bitmap: [N + 1]
  const float* bias = nullptr;           // [columns] or null
  float* out = nullptr;                  // [tokens, columns]
};

// A multiple of the columns that any table's `dot` reads at a time: of its merge panel, and of a unit of a stored row.
inline constexpr int64_t kDotColumns = 64;

// The same for a few tokens, forward only: out [tokens, N].
struct DotJob {
  int64_t tokens = 0, out_features = 0;
  const void* src = nullptr;  // activation [tokens, K] row-major
  DType src_dtype = DType::float32;
  void* activation = nullptr;   // scratch of float32 [tokens, stride]: pack_dot writes them there as `dot` reads them
  float* limits = nullptr;      // scratch [tokens], likewise
  int64_t stride = 0;           // K rounded up to kDotColumns, zero-padded
  MergeJob weight;              // without a result
  const float* bias = nullptr;  // [N] or null
  float* out = nullptr;         // [tokens, N]
};

// activation [tokens, depth] as [depth blocks][token panels][depth in block][fused_rows] float32, zero-padded.
struct PackActivationJob {
  int64_t tokens = 0, depth = 0;
  const void* src = nullptr;  // [tokens, depth] row-major
  DType src_dtype = DType::float32;
  float* dst = nullptr;
};

struct KernelTable {
  const char* name;     // "baseline", "avx2", "avx512", "avx512_bf16"
  int64_t merge_panel;  // columns of a merge panel in float32; half of it in float64
  void (*pack)(const PackJob&, int64_t row_begin, int64_t row_end);
  void (*merge)(const MergeJob&, int64_t row_begin, int64_t row_end);  // codes: to bfloat16, or unrounded
  void (*contract_rows)(const ContractJob&, int64_t row_begin, int64_t row_end);
  void (*contract_columns)(const ContractJob&, int64_t column_begin, int64_t column_end);
  void (*store)(const StoreJob&, int64_t row_begin, int64_t row_end);
  int64_t fused_rows, fused_columns, fused_depth;  // of a register tile, and of a depth block
  int64_t fused_scratch;                           // float32 elements of scratch each fused_matmul call needs
  void (*pack_activation)(const PackActivationJob&, int64_t panel_begin, int64_t panel_end);
  // cursors: of a bitmap, scratch [N].
  void (*fused_matmul)(const FusedJob&, int64_t panel_begin, int64_t panel_end, float* scratch, int64_t* cursors);
  int64_t lanes;  // float32 elements of a vector
  void (*pack_dot)(const DotJob&, int64_t token_begin, int64_t token_end);
  // sums: scratch [row_end - row_begin, tokens, lanes].
  void (*dot)(const DotJob&, int64_t row_begin, int64_t row_end, float* sums);
  // Whether bfloat16 [count] may be multiplied in pairs; null where the instruction set cannot.
  bool (*pairs_are_exact)(const void* elements, int64_t count);
  // merged = sum_r B[n, r] A[r, k] in float32, without a weight.
  void (*multiply)(const MergeJob&, int64_t row_begin, int64_t row_end);
  void (*draw)(const DrawJob&);
  bool dots_stored;  // whether `dot` multiplies values as they are stored, a dense weight's too, where there is no adapter
};

// The table for this processor, chosen once; LORS_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16 selects a lower one.
const KernelTable& kernels();

}  // namespace lors::cpu
