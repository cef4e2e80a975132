// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <lors/product_choice.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace lors {

namespace {

constexpr int kRounds = 5;  // timed runs of each way, taking turns

Status cuda_answer(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears it: the caller's next launch must not find it
  return Status::error(std::string("lors_cuda could not measure a product: ") + cudaGetErrorString(error) + ".");
}

cudaStream_t stream_of(const CudaHost& host) { return static_cast<cudaStream_t>(host.stream); }

class Event {
 public:
  Status init() { return cuda_answer(cudaEventCreate(&event_)); }
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  Status record(const CudaHost& host) { return cuda_answer(cudaEventRecord(event_, stream_of(host))); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Microseconds of one run on the device.
Status time(const std::function<Status()>& way, const CudaHost& host, Event& begin, Event& end, std::vector<double>& times) {
  if (Status s = begin.record(host); !s.ok()) return s;
  if (Status s = way(); !s.ok()) return s;
  if (Status s = end.record(host); !s.ok()) return s;
  if (Status s = cuda_answer(cudaEventSynchronize(end.get())); !s.ok()) return s;
  float milliseconds = 0;
  if (Status s = cuda_answer(cudaEventElapsedTime(&milliseconds, begin.get(), end.get())); !s.ok()) return s;
  times.push_back(1000.0 * milliseconds);
  return {};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double widened(uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(fraction, -24)
                                       : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

// Rows of the output on the host: the first and last eight, and as many between.
Status sample(const ProductRequest& request, const CudaHost& host, std::vector<uint16_t>& values) {
  const SparseProductProblem& p = request.key.problem;
  const int64_t columns = p.input_gradient ? p.in_features : p.out_features, row_bytes = 2 * columns;
  constexpr int64_t kBlock = 8;
  values.clear();
  for (const int64_t first : {int64_t{0}, p.tokens / 2 / kBlock * kBlock, p.tokens - kBlock}) {
    const size_t at = values.size();
    values.resize(at + kBlock * columns);
    const char* from = static_cast<const char*>(request.output) + first * row_bytes;
    const cudaError_t error =
        cudaMemcpyAsync(values.data() + at, from, kBlock * row_bytes, cudaMemcpyDeviceToHost, stream_of(host));
    if (Status s = cuda_answer(error); !s.ok()) return s;
  }
  return cuda_answer(cudaStreamSynchronize(stream_of(host)));
}

// Whether a dense result can show a wrong sparse one: some of it is finite and comes from the product. Under a bias a product
// of zeros leaves the same in every row.
bool tells(const std::vector<uint16_t>& dense, const ProductKey& key) {
  const SparseProductProblem& p = key.problem;
  const size_t columns = p.input_gradient ? p.in_features : p.out_features;
  for (size_t i = 0; i < dense.size(); ++i) {
    const double value = widened(dense[i], p.dtype), added = key.bias ? widened(dense[i % columns], p.dtype) : 0;
    if (std::isfinite(value) && std::isfinite(added) && value != added) return true;
  }
  return false;
}

// Whether two results differ by no more than roundings: in relative L2 norm, where the dense one is finite. A wrong order of
// values or metadata is off by the whole norm.
bool agree(const std::vector<uint16_t>& dense, const std::vector<uint16_t>& sparse, DType dtype) {
  const bool wide = dtype == DType::bfloat16;
  const double overflow = std::ldexp(1.0, wide ? 128 : 16);  // the first number that is too large
  double error = 0, norm = 0, count = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    const double a = widened(dense[i], dtype);
    double b = widened(sparse[i], dtype);
    if (!std::isfinite(a)) continue;  // overflow need not strike both: sums run in another order
    if (std::isnan(b)) return false;
    if (std::isinf(b)) b = std::copysign(overflow, b);  // one rounding away from the largest number, far from others
    error += (a - b) * (a - b);
    norm += a * a;
    ++count;
  }
  const double unit_roundoff = wide ? 1.0 / 256 : 1.0 / 2048;
  const double step = wide ? 0 : std::ldexp(1.0, -24);  // between numbers so small that roundoff no longer shrinks with them
  return std::sqrt(error) <= 8 * unit_roundoff * std::sqrt(norm) + step * std::sqrt(count);
}

constexpr const char* kDisagrees =
    "cuSPARSELt's product differs from the dense one by more than rounding; please report the device and the library's "
    "version.";

enum class Products { automatic, dense, sparse };

Status read(std::string_view text, const char* name, Products& products) {
  if (text == "auto")
    products = Products::automatic;
  else if (text == "dense")
    products = Products::dense;
  else if (text == "sparse")
    products = Products::sparse;
  else
    return Status::error(std::string(name) + " is '" + std::string(text) + "'; it must be auto, dense or sparse.");
  return {};
}

// `where`: what said so.
Status wanted(std::string_view argument, Products& products, const char*& where) {
  where = "products";
  if (Status s = read(argument, where, products); !s.ok() || products != Products::automatic) return s;
  const char* environment = std::getenv("LORS_SPARSE_PRODUCT");
  if (!environment || !*environment) return {};
  where = "LORS_SPARSE_PRODUCT";
  return read(environment, where, products);
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

struct ProductChoices::State {
  mutable std::mutex mutex;
  std::map<ProductKey, ProductChoice> choices;
  std::set<ProductKey> measuring, checked;
};

std::shared_ptr<ProductChoices::State> ProductChoices::make_state() { return std::make_shared<State>(); }

Status ProductChoices::of_current_device(ProductChoices*& found) {
  static std::mutex mutex;
  static auto* const all = new std::map<SparseProducts*, ProductChoices*>;  // never destroyed, as SparseProducts
  SparseProducts* sparse = nullptr;
  if (Status s = SparseProducts::of_current_device(sparse); !s.ok()) return s;
  const std::lock_guard lock(mutex);
  ProductChoices*& own = (*all)[sparse];
  if (!own) own = new ProductChoices(*sparse);
  found = own;
  return {};
}

std::optional<ProductChoice> ProductChoices::find(const ProductKey& key) const {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->choices.find(key);
  return found == state_->choices.end() ? std::nullopt : std::optional(found->second);
}

bool ProductChoices::is_checked(const ProductKey& key) const {
  const std::lock_guard lock(state_->mutex);
  return state_->checked.contains(key);
}

void ProductChoices::check(const ProductKey& key) {
  const std::lock_guard lock(state_->mutex);
  if (state_->checked.size() >= 4096) state_->checked.clear();
  state_->checked.insert(key);
}

// Whether the caller shall measure this kind: no other thread does, and not too many token counts of its shape are known.
bool ProductChoices::begin_measuring(const ProductKey& key, bool forced) {
  const std::lock_guard lock(state_->mutex);
  int token_counts = 0;
  for (const auto& [other, choice] : state_->choices) {
    ProductKey same = other;
    same.problem.tokens = key.problem.tokens;
    token_counts += same == key;
  }
  return (forced || token_counts < kTokenCounts) && state_->measuring.insert(key).second;
}

Status ProductChoices::measure(const ProductRequest& request, const ProductWays& ways, const CudaHost& host, bool forced,
                               bool timed, std::optional<ProductChoice>& measured) {
  std::vector<uint16_t> dense, sparse;
  if (Status s = ways.dense(); !s.ok()) return s;
  if (Status s = sample(request, host, dense); !s.ok()) return s;
  if (!tells(dense, request.key)) return {};
  ProductChoice choice{false, 0, 0, "", true};
  try {
    choice.note = ways.sparse().message();
  } catch (const std::exception&) {  // the host's: out of memory, say, which may be otherwise the next time
    if (forced) throw;
    return ways.dense();
  }
  if (choice.note.empty()) {
    if (Status s = sample(request, host, sparse); !s.ok()) return s;
    if (!agree(dense, sparse, request.key.problem.dtype)) choice.note = kDisagrees;
  }
  choice.sparse = choice.note.empty();
  measured = choice;
  if (!choice.sparse) return forced ? Status() : ways.dense();
  if (!timed) return {};
  Event begin, end;
  if (Status s = begin.init(); !s.ok()) return s;
  if (Status s = end.init(); !s.ok()) return s;
  std::vector<double> dense_times, sparse_times;
  for (int round = 0; round < kRounds; ++round) {
    if (Status s = time(ways.dense, host, begin, end, dense_times); !s.ok()) return s;
    if (Status s = time(ways.sparse, host, begin, end, sparse_times); !s.ok()) return s;
  }
  choice.dense_us = median(dense_times);
  choice.sparse_us = median(sparse_times);
  choice.sparse = choice.sparse_us < choice.dense_us;
  measured = choice;
  return choice.sparse ? Status() : ways.dense();
}

Status ProductChoices::take(const ProductRequest& request, const ProductWays& ways, const CudaHost& host) {
  Products products = Products::automatic;
  const char* where = nullptr;
  if (Status s = wanted(request.products, products, where); !s.ok()) return s;
  if (products == Products::dense || request.key.problem.tokens == 0) return ways.dense();  // of nothing there is one way
  const bool forced = products == Products::sparse;
  const auto refuse = [where](const std::string& why) {
    return Status::error(std::string(where) + " is 'sparse', but " + why + " Use 'auto' or 'dense'.");
  };

  Status served = sparse_.serves(request.key.problem);
  if (served.ok() && !(aligned(request.activation) && aligned(request.output)))
    served = Status::error("the activations do not begin at a multiple of 16 bytes.");
  if (!served.ok()) return forced ? refuse(served.message()) : ways.dense();

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (Status s = cuda_answer(cudaStreamIsCapturing(stream_of(host), &status)); !s.ok()) return s;
  const bool captured = status != cudaStreamCaptureStatusNone;

  const std::optional<ProductChoice> choice = find(request.key);
  // A sparse way that failed or was wrong stays out; one that was only slower is taken where it is asked for.
  if (forced && choice && !choice->note.empty()) return refuse(choice->note);
  if (choice && !choice->sparse && !forced) return ways.dense();
  // What was loaded is compared once here too.
  if ((choice && choice->compared) || (forced && is_checked(request.key))) {
    // Its plan may be gone, or not made yet for a choice that was loaded; under capture it cannot be made.
    return captured && !forced && !sparse_.ready(request.key.problem) ? ways.dense() : ways.sparse();
  }
  if (captured)
    return forced
               ? refuse("a CUDA graph is being captured and this product has not run before; run it once before the capture.")
               : ways.dense();
  const bool first = begin_measuring(request.key, forced || choice);
  if (!first && !forced) return ways.dense();  // where it is asked for, each thread that meets it now compares for itself
  struct Done {
    State& state;
    const ProductKey* key;
    ~Done() {
      if (!key) return;
      const std::lock_guard lock(state.mutex);
      state.measuring.erase(*key);
    }
  } done{*state_, first ? &request.key : nullptr};
  std::optional<ProductChoice> measured;
  // Leaves the output right, except where what was forced did not go.
  if (Status s = measure(request, ways, host, forced, !forced && !choice, measured); !s.ok()) return s;
  if (!measured) return {};  // nothing was learnt: the next call tries again
  if (!measured->note.empty()) {
    set(request.key, *measured);
    return forced ? refuse(measured->note) : Status();
  }
  if (choice) {
    measured = choice;  // its times
    measured->compared = true;
  }
  // A forced product is only compared: which way is faster is still open.
  if (forced && !choice) return check(request.key), Status();
  set(request.key, *measured);
  return {};
}

std::vector<std::pair<ProductKey, ProductChoice>> ProductChoices::all() const {
  const std::lock_guard lock(state_->mutex);
  return {state_->choices.begin(), state_->choices.end()};
}

void ProductChoices::set(const ProductKey& key, const ProductChoice& choice) {
  const std::lock_guard lock(state_->mutex);
  state_->choices[key] = choice;
}

void ProductChoices::clear() {
  const std::lock_guard lock(state_->mutex);
  state_->choices.clear();
  state_->checked.clear();
}

}  // namespace lors
