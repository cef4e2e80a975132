// SPDX-License-Identifier: Apache-2.0
// SparseProducts: the plans of one device, in the order of their last use. One lock around every call of the library, whose
// handle is not documented to take two at once; workspace is allocated outside it, except while a plan is made.
#include <cuda_runtime_api.h>
#include <lors/sparse_product.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>

#include "cusparselt.h"
#include "scratch.h"

namespace lors {

namespace {

using cusparselt::Version;

constexpr int64_t kStructuredSides = 16, kDenseSides = 8;  // what 16-bit sides must be multiples of
constexpr int64_t kElements = int64_t{1} << 31;            // of one matrix, less than

Status cuda_answer(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears it: the caller's next launch must not find it
  return Status::error(std::string("lors_cuda could not ") + what + ": " + cudaGetErrorString(error) + ".");
}

Status not_a_multiple(const char* what, int64_t size, int64_t of) {
  return Status::error(std::string("the sparse tensor cores need ") + what + " in multiples of " + std::to_string(of) +
                       ", and it is " + std::to_string(size) + ".");
}

class ScratchBytes : public cuda::Scratch {
 public:
  ScratchBytes(const CudaHost& host, size_t bytes) : Scratch(host, static_cast<int64_t>((bytes + 3) / 4)) {}
};

Status capturing(const CudaHost& host, bool& is) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(host.stream), &status);
  is = status != cudaStreamCaptureStatusNone;
  return cuda_answer(error, "ask whether its stream is captured");
}

int wanted_maximum() {
  const char* text = std::getenv("LORS_SPARSE_PLANS");
  return text ? std::atoi(text) : 256;
}

}  // namespace

struct SparseProducts::State {
  using Key = SparseProductProblem;
  struct Entry {
    explicit Entry(const cusparselt::Handle& handle) : plan(handle) {}
    cusparselt::Plan plan;
    size_t workspace = 0;
    bool captured = false;
  };
  using Order = std::list<std::pair<Key, std::shared_ptr<Entry>>>;

  State(const cusparselt::Library& library, int maximum) : library(library), maximum(maximum), handle(library) {}

  const cusparselt::Library& library;
  const int64_t maximum;
  cusparselt::Handle handle;
  Status problem;                      // why the library does not serve this device
  mutable std::recursive_mutex mutex;  // again by a plan that dies under it
  Order order;                         // the latest used first
  std::map<Key, Order::iterator> plans;
  std::map<Key, cusparselt::Algorithm> algorithms;
  std::map<Key, SparseProductSizes> sizes;
  int64_t hits = 0, misses = 0, searches = 0;

  Status start();
  std::shared_ptr<Entry> find(const Key& key);
  Status make(const SparseProductArgs& args, const CudaHost& host, std::shared_ptr<Entry>& made);
  void keep(const Key& key, std::shared_ptr<Entry> entry);
  void remember(const Key& key, const cusparselt::Algorithm& found) {
    // Three numbers each, so many more of them than plans; without an end they would still be a leak.
    if (static_cast<int64_t>(algorithms.size()) >= 16 * maximum) algorithms.clear();
    algorithms[key] = found;
  }
};

Status SparseProducts::State::start() {
  if (!library.problem.empty()) return Status::error(library.problem);
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (Status s = cuda_answer(error, "ask CUDA for its device"); !s.ok()) return s;
  const std::string architecture = std::to_string(major) + "." + std::to_string(minor);
  if (major < 8)
    return Status::error("the device has compute capability " + architecture + "; sparse tensor cores begin with 8.0.");
  // 0.8.0 is slow on these two, by its release notes: docs.nvidia.com/cuda/cusparselt/release_notes.html
  constexpr Version kHopperAda{0, 8, 1};
  if (((major == 9 && minor == 0) || (major == 8 && minor == 9)) && library.version < kHopperAda)
    return Status::error("cuSPARSELt " + library.version.text() + " is too old for compute capability " + architecture + "; " +
                         kHopperAda.text() + " or later is needed (pip install -U nvidia-cusparselt-cu12 or -cu13).");
  return handle.init();
}

std::shared_ptr<SparseProducts::State::Entry> SparseProducts::State::find(const Key& key) {
  const auto found = plans.find(key);
  if (found == plans.end()) return nullptr;
  order.splice(order.begin(), order, found->second);
  return found->second->second;
}

void SparseProducts::State::keep(const Key& key, std::shared_ptr<Entry> entry) {
  order.emplace_front(key, std::move(entry));
  plans[key] = order.begin();
  for (auto last = order.end(); static_cast<int64_t>(order.size()) > maximum && last != std::next(order.begin());) {
    --last;
    if (last->second->captured) continue;
    plans.erase(last->first);
    last = order.erase(last);
  }
}

Status SparseProducts::State::make(const SparseProductArgs& args, const CudaHost& host, std::shared_ptr<Entry>& made) {
  const Key& key = args.problem;
  const auto init = [&](const cusparselt::Algorithm* known) {
    // Whoever lets a plan go last, perhaps after it was dropped here, does so under the lock too.
    made = std::shared_ptr<Entry>(new Entry(handle), [this](Entry* entry) {
      const std::lock_guard lock(mutex);
      delete entry;
    });
    return made->plan.init(key.out_features, key.in_features, key.tokens, key.dtype, key.input_gradient, known);
  };
  const auto known = algorithms.find(key);
  // What an earlier search has found may not fit any more (it may come from a file): then the search decides.
  if (known != algorithms.end() && init(&known->second).ok() && made->plan.workspace_bytes(made->workspace).ok()) return {};
  if (Status s = init(nullptr); !s.ok()) return s;
  if (Status s = made->plan.workspace_bytes(made->workspace); !s.ok()) return s;
  cusparselt::Algorithm found;
  {
    const ScratchBytes workspace(host, made->workspace);
    ++searches;
    if (Status s = made->plan.search(args.compressed, args.activation, args.output, workspace.data(), host.stream, found);
        !s.ok())
      return s;
  }
  remember(key, found);
  return made->plan.workspace_bytes(made->workspace);  // the found algorithm's
}

SparseProducts::SparseProducts(const cusparselt::Library& library, int maximum)
    : state_(std::make_unique<State>(library, maximum)) {
  state_->problem = maximum < 1 ? Status::error("LORS_SPARSE_PLANS must be a number, at least 1.") : state_->start();
}

SparseProducts::~SparseProducts() = default;

Status SparseProducts::of_current_device(SparseProducts*& found) {
  static std::mutex mutex;
  static auto* const all = new std::map<int, SparseProducts*>;
  int device = 0;
  if (Status s = cuda_answer(cudaGetDevice(&device), "ask CUDA for its device"); !s.ok()) return s;
  const std::lock_guard lock(mutex);
  SparseProducts*& own = (*all)[device];
  if (!own) own = new SparseProducts(cusparselt::library(), wanted_maximum());
  found = own;
  return {};
}

Status SparseProducts::serves() const { return state_->problem; }

Status SparseProducts::serves(const SparseProductProblem& p) const {
  if (!state_->problem.ok()) return state_->problem;
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16)
    return Status::error("the sparse tensor cores are used for bfloat16 and float16 only.");
  if (p.out_features % kStructuredSides || p.out_features == 0)
    return not_a_multiple("out_features", p.out_features, kStructuredSides);
  if (p.in_features % kStructuredSides || p.in_features == 0)
    return not_a_multiple("in_features", p.in_features, kStructuredSides);
  if (p.tokens % kDenseSides) return not_a_multiple("the number of tokens", p.tokens, kDenseSides);
  if (p.out_features >= kElements / p.in_features ||
      (p.tokens && p.tokens >= kElements / std::max(p.out_features, p.in_features)))
    return Status::error("cuSPARSELt takes matrices of fewer than 2^31 elements.");
  return {};
}

std::string SparseProducts::version() const { return state_->library.problem.empty() ? state_->library.version.text() : ""; }

Status SparseProducts::sizes(int64_t out_features, int64_t in_features, DType dtype, SparseProductSizes& sizes) {
  const State::Key weight{out_features, in_features, 0, dtype, false};
  if (Status s = serves(weight); !s.ok()) return s;
  const std::lock_guard lock(state_->mutex);
  if (const auto known = state_->sizes.find(weight); known != state_->sizes.end()) {
    sizes = known->second;
    return {};
  }
  cusparselt::Matrix matrix(state_->handle);
  if (Status s = matrix.init(out_features, in_features, dtype, cusparselt::kRowMajor, true); !s.ok()) return s;
  size_t compressed = 0, scratch = 0;
  const int status = state_->library.call.SpMMACompressedSize2(state_->handle.get(), matrix.get(), &compressed, &scratch);
  if (Status s = answer(state_->library, status, "SpMMACompressedSize2"); !s.ok()) return s;
  sizes = {out_features * in_features / 2 * dtype_size(dtype), static_cast<int64_t>(compressed), static_cast<int64_t>(scratch)};
  if (static_cast<int64_t>(state_->sizes.size()) >= state_->maximum) state_->sizes.clear();
  state_->sizes[weight] = sizes;
  return {};
}

Status SparseProducts::compress(const SparseProductCompressArgs& args, const CudaHost& host) {
  SparseProductSizes sizes;
  if (Status s = this->sizes(args.out_features, args.in_features, args.dtype, sizes); !s.ok()) return s;
  const ScratchBytes scratch(host, sizes.scratch);
  const std::lock_guard lock(state_->mutex);
  cusparselt::Matrix matrix(state_->handle);
  if (Status s = matrix.init(args.out_features, args.in_features, args.dtype, cusparselt::kRowMajor, true); !s.ok()) return s;
  const int operation = args.transposed ? cusparselt::kTranspose : cusparselt::kNonTranspose;
  return answer(state_->library,
                state_->library.call.SpMMACompress2(state_->handle.get(), matrix.get(), 1, operation, args.merged,
                                                    args.compressed, scratch.data(), host.stream),
                "SpMMACompress2");
}

Status SparseProducts::prepare(const SparseProductArgs& args, const CudaHost& host, Plan& plan) {
  if (Status s = serves(args.problem); !s.ok()) return s;
  bool captured = false;
  if (Status s = capturing(host, captured); !s.ok()) return s;
  const std::lock_guard lock(state_->mutex);
  std::shared_ptr<State::Entry> entry = state_->find(args.problem);
  ++(entry ? state_->hits : state_->misses);
  if (!entry && captured)
    return Status::error("a CUDA graph is being captured, and no plan of this product is there yet; run it once before.");
  if (!entry) {
    if (Status s = state_->make(args, host, entry); !s.ok()) return s;
    state_->keep(args.problem, entry);
  }
  entry->captured = entry->captured || captured;
  plan = std::move(entry);
  return {};
}

Status SparseProducts::run(const SparseProductArgs& args, const Plan& plan, const CudaHost& host) {
  const auto& entry = *static_cast<const State::Entry*>(plan.get());
  const ScratchBytes workspace(host, entry.workspace);
  const std::lock_guard lock(state_->mutex);
  return entry.plan.run(args.compressed, args.activation, args.output, args.add, workspace.data(), host.stream);
}

bool SparseProducts::ready(const SparseProductProblem& problem) const {
  const std::lock_guard lock(state_->mutex);
  return state_->plans.contains(problem);
}

SparseProductPlans SparseProducts::plans() const {
  const std::lock_guard lock(state_->mutex);
  SparseProductPlans info{state_->hits, state_->misses, state_->searches, state_->maximum, {}};
  for (const auto& [key, entry] : state_->order)
    info.plans.push_back({key, static_cast<int64_t>(entry->workspace), entry->captured});
  return info;
}

void SparseProducts::clear() {
  const std::lock_guard lock(state_->mutex);
  for (auto at = state_->order.begin(); at != state_->order.end();) {
    const bool stays = at->second->captured;
    if (!stays) state_->plans.erase(at->first);
    at = stays ? std::next(at) : state_->order.erase(at);
  }
  state_->algorithms.clear();
  state_->hits = state_->misses = state_->searches = 0;
}

bool SparseProducts::algorithm(const SparseProductProblem& problem, SparseProductAlgorithm& found) const {
  const std::lock_guard lock(state_->mutex);
  const auto known = state_->algorithms.find(problem);
  if (known == state_->algorithms.end()) return false;
  found = known->second;
  return true;
}

void SparseProducts::know(const SparseProductProblem& problem, const SparseProductAlgorithm& algorithm) {
  const std::lock_guard lock(state_->mutex);
  state_->remember(problem, algorithm);
}

}  // namespace lors
