// SPDX-License-Identifier: Apache-2.0
// Y = X W~^T on the sparse tensor cores, W~ [N, K] a merged 2:4 weight as cuSPARSELt compresses it; and, where W~^T is 2:4 too
// (a transposable mask), dX = dY W~. bfloat16 and float16. CUDA only: the library is opened at run time, and where it is not
// there or does not serve, the functions say why and the caller multiplies densely (docs/sparse-products.md).
#pragma once

#include <lors/status.h>
#include <lors/types.h>

#include <compare>
#include <memory>
#include <string>
#include <vector>

namespace lors {

namespace cusparselt {
struct Library;
}

// One product; all of it decides how it is best taken.
struct SparseProductProblem {
  int64_t out_features = 0;      // N
  int64_t in_features = 0;       // K
  int64_t tokens = 0;            // T
  DType dtype = DType::float32;  // of W~, activation and output
  bool input_gradient = false;   // dX = dY W~ instead of Y = X W~^T
  auto operator<=>(const SparseProductProblem&) const = default;
};

struct SparseProductArgs {
  SparseProductProblem problem;
  const void* compressed =
      nullptr;  // W~ (for the input gradient W~^T), `compressed` bytes of SparseProductSizes, made by compress
  const void* activation = nullptr;  // [T, K]; for the input gradient [T, N]
  void* output = nullptr;            // [T, N]; for the input gradient [T, K]
  bool add = false;                  // output += product: how a bias comes in, rounded once
};

// Bytes of what the library makes of a weight. It is not documented; where the values come first, row-major [N, K/2] in the
// slots of sparse24.h, sparse24_merge can write them in place. The caller finds that out, weight by weight
// (docs/sparse-products.md).
struct SparseProductSizes {
  int64_t values = 0;      // N K / 2 values
  int64_t compressed = 0;  // all of it: values and the library's metadata
  int64_t scratch = 0;     // while it compresses
};

struct SparseProductCompressArgs {
  int64_t out_features = 0;
  int64_t in_features = 0;
  DType dtype = DType::float32;
  bool transposed = false;       // compress W~^T, for the input gradient
  const void* merged = nullptr;  // [N, K], at most two nonzeros in each group of four along K (transposed: along N)
  void* compressed = nullptr;
};

// How the library takes a product, by its own numbers: found by a search, and what spares another.
struct SparseProductAlgorithm {
  int config = 0, split_k = 1, split_k_mode = 0;
};

struct SparseProductPlans {
  struct Plan {
    SparseProductProblem problem;
    int64_t workspace = 0;  // bytes taken for each call
    bool captured = false;  // a CUDA graph holds it: it stays
  };
  int64_t hits = 0, misses = 0, searches = 0, maximum = 0;
  std::vector<Plan> plans;  // the latest used first
};

// The library on one device, with its plans: at most `maximum`, the longest unused one goes first. Thread-safe; every call is
// made with the device current.
class SparseProducts {
 public:
  // The process's own for the current device, its library as LORS_CUSPARSELT says, `maximum` from LORS_SPARSE_PLANS (256).
  // Never destroyed: at exit the driver may be gone already.
  static Status of_current_device(SparseProducts*& found);

  SparseProducts(const cusparselt::Library& library, int maximum);
  ~SparseProducts();

  // Success if this library serves this device, and if it can take this product; else a sentence.
  Status serves() const;
  Status serves(const SparseProductProblem& problem) const;
  std::string version() const;  // "0.8.1"; empty without a library

  Status sizes(int64_t out_features, int64_t in_features, DType dtype, SparseProductSizes& sizes);
  Status compress(const SparseProductCompressArgs& args, const CudaHost& host);

  // The plan that `run` needs. If it is not there it is made, the first time with the library's search, which waits for the
  // device and overwrites the output. Under stream capture a plan must be there, and is kept for the graph.
  using Plan = std::shared_ptr<void>;
  Status prepare(const SparseProductArgs& args, const CudaHost& host, Plan& plan);
  // Queues the product; waits for nothing.
  Status run(const SparseProductArgs& args, const Plan& plan, const CudaHost& host);
  bool ready(const SparseProductProblem& problem) const;

  SparseProductPlans plans() const;
  void clear();  // forgets plans (but those that a graph holds), algorithms and counts
  // What searches have found; `know` spares one.
  bool algorithm(const SparseProductProblem& problem, SparseProductAlgorithm& found) const;
  void know(const SparseProductProblem& problem, const SparseProductAlgorithm& algorithm);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lors
