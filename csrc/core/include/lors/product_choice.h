// SPDX-License-Identifier: Apache-2.0
// Whether a product of a 2:4 weight runs on the sparse tensor cores (sparse_product.h) or as a merge and a dense product:
// measured once for each kind of product, merge and copying included, so that 2:4 is not slower than dense.
#pragma once

#include <lors/sparse_product.h>

#include <functional>
#include <optional>
#include <string_view>
#include <utility>

namespace lors {

// One kind of product: its sizes and type, and how its operands come.
struct ProductKey {
  SparseProductProblem problem;
  bool in_place =
      false;  // the merge writes the library's compressed values itself; else the library compresses the dense merge
  bool bias = false;
  auto operator<=>(const ProductKey&) const = default;
};

struct ProductChoice {
  bool sparse = false;
  double dense_us = 0, sparse_us = 0;  // medians; 0: not measured
  std::string note;                    // why it is not sparse, where that is no matter of time
  bool compared = false;               // here, with the dense result; one that was loaded is not yet
};

// The two ways. Each computes all of the same output [T, N] (input gradient: [T, K]) in device memory, queued on the host's
// stream.
struct ProductWays {
  std::function<Status()> dense, sparse;
};

struct ProductRequest {
  ProductKey key;
  std::string_view products = "auto";  // "auto", "dense" or "sparse"; LORS_SPARSE_PRODUCT says what "auto" is
  const void* activation = nullptr;
  const void* output = nullptr;
};

// The choices of one device. Thread-safe.
class ProductChoices {
 public:
  static Status of_current_device(ProductChoices*& found);
  explicit ProductChoices(SparseProducts& sparse) : sparse_(sparse) {}

  // Computes the product in one of the two ways. "auto": the faster one, found by running both some times when a kind is met
  // first (which waits for the device); never under stream capture, where a kind not yet met runs densely. The results of both
  // are compared then, and a sparse one that is not the dense one's within rounding is never used. A result that can show
  // nothing (zeros, or nothing finite) and a failure that is thrown (out of memory, say) decide nothing.
  Status take(const ProductRequest& request, const ProductWays& ways, const CudaHost& host);

  std::vector<std::pair<ProductKey, ProductChoice>> all() const;
  void set(const ProductKey& key, const ProductChoice& choice);
  void clear();
  SparseProducts& sparse() { return sparse_; }

  // Token counts of one shape that are measured; beyond them "auto" is dense, because a search for every length of a text costs
  // more than it gains.
  static constexpr int kTokenCounts = 8;

 private:
  std::optional<ProductChoice> find(const ProductKey& key) const;
  bool is_checked(const ProductKey& key) const;
  void check(const ProductKey& key);
  bool begin_measuring(const ProductKey& key, bool forced);
  // Leaves `measured` empty where nothing was learnt.
  Status measure(const ProductRequest& request, const ProductWays& ways, const CudaHost& host, bool forced, bool timed,
                 std::optional<ProductChoice>& measured);

  SparseProducts& sparse_;
  struct State;
  std::shared_ptr<State> state_ = make_state();
  static std::shared_ptr<State> make_state();
};

}  // namespace lors
