// SPDX-License-Identifier: Apache-2.0
// Which path computes Y = X W~^T + b and dX = dY W~ on CUDA: one table of records per architecture and one pure function. Only
// what was measured is taken: outside the records it is a merge and torch's matmul.
#pragma once

#include <lors/types.h>

#include <span>

namespace lors::cuda {

enum class Path {
  merge_matmul,
  fused_linear,   // dense weights only
  sparse_matmul,  // 2:4 weights in 16 bits, Y only
};

// Of an adapted weight [N, K] and `tokens` activations of `dtype`.
struct PathShape {
  DType dtype;
  Layout layout;
  bool input_gradient;
  int64_t out_features, in_features, tokens;
};

// `path` was the fastest at `first` and at `last` tokens and wherever it was measured between them, merge included.
struct PathRecord {
  PathShape shape;  // its `tokens` are `first`
  int64_t last;
  Path path;
  const char* source;  // the file in bench/results
};

// `architecture`: 90 for compute capability 9.0.
constexpr std::span<const PathRecord> path_records(int architecture) {
  switch (architecture) {
    default: return {};  // 80, 86, 89, 90, 100, 120: no record: merge + matmul
  }
}

constexpr Path recorded_path(std::span<const PathRecord> records, const PathShape& s) {
  for (const PathRecord& of : records)
    if (of.shape.dtype == s.dtype && of.shape.layout == s.layout && of.shape.input_gradient == s.input_gradient &&
        of.shape.out_features == s.out_features && of.shape.in_features == s.in_features && of.shape.tokens <= s.tokens &&
        s.tokens <= of.last)
      return of.path;
  return Path::merge_matmul;
}

}  // namespace lors::cuda
