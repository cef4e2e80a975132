// SPDX-License-Identifier: Apache-2.0
// Launches compressing, decompressing and checking of 2:4 weights. The merges are in merge_compressed.cu.
#include "sparse24.cuh"

#include <lors/sparse24.h>

#include "launch.h"
#include "scratch.h"

namespace lors {
namespace {

using namespace cuda;

Status check_sizes(const char* name, int64_t N, int64_t K, DType dtype) {
  if (K % 4 != 0)
    return Status::error(std::string(name) + " was given a weight of [" + std::to_string(N) + ", " + std::to_string(K) +
                         "]; 2:4 needs in_features to be a multiple of 4.");
  if (dtype == DType::float64)
    return Status::error(std::string(name) +
                         " on CUDA takes float32, bfloat16 and float16, and was given float64; convert the tensors or move "
                         "them to the CPU.");
  return {};
}

Sparse24Problem problem_of(int64_t N, int64_t K, const void* weight, const uint32_t* mask, const void* values,
                           const uint8_t* metadata) {
  Sparse24Problem p{};
  p.weight = weight;
  p.mask = reinterpret_cast<const uint8_t*>(mask);
  p.mask_pitch = 4 * mask_words(K);
  // Each kernel writes one side and only reads the other.
  p.values = const_cast<void*>(values);
  p.metadata = const_cast<uint8_t*>(metadata);
  p.out_features = N;
  p.in_features = K;
  p.bytes = sparse24_metadata_bytes(K);
  p.weight_vectors = has_vectors(weight, K);
  p.values_vectors = K % 8 == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  return p;
}

Status launch_threads(const char* name, void (*kernel)(Sparse24Problem), const Sparse24Problem& p, int64_t threads,
                      const CudaHost& host) {
  const int64_t blocks = (threads + kSparse24Threads - 1) / kSparse24Threads;
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff)
    return Status::error(std::string(name) + " was given a weight of [" + std::to_string(p.out_features) + ", " +
                         std::to_string(p.in_features) + "], more than one launch covers; split it by rows.");
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSparse24Threads), 0, host, p);
}

// The kernel's tallies, added up in report[0 .. kWords).
template <int kWords>
Status launch_tallied(const char* name, void (*kernel)(Sparse24Problem), Sparse24Problem p, int64_t threads, int64_t* report,
                      const CudaHost& host) {
  const int64_t blocks = (threads + kSparse24Threads - 1) / kSparse24Threads, warps = blocks * (kSparse24Threads / kWarp);
  const Scratch tallies(host, warps * int64_t(sizeof(Tally)) / 4);
  p.tallies = reinterpret_cast<Tally*>(tallies.data());
  if (Status status = launch_threads(name, kernel, p, threads, host); !status.ok()) return status;
  return launch(name, tally_sum_kernel<kWords>, dim3(1), dim3(kWarp), 0, host, static_cast<const Tally*>(p.tallies), warps,
                report);
}

// The instantiation of a kernel template for a dtype.
#define LORS_KERNEL(name, dtype) \
  ((dtype) == DType::bfloat16 ? name<bfloat16> : (dtype) == DType::float16 ? name<float16> : name<float>)

}  // namespace

Status sparse24_inspect(const Sparse24InspectArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status = check_sizes("sparse24_inspect", N, K, args.weight_dtype); !status.ok()) return status;
  const Sparse24Problem p = problem_of(N, K, args.weight, args.mask, nullptr, nullptr);
  return launch_tallied<3>("sparse24_inspect", LORS_KERNEL(sparse24_inspect_kernel, args.weight_dtype), p,
                           (N + 3) / 4 * p.bytes, reinterpret_cast<int64_t*>(args.report), host);
}

Status sparse24_compress(const Sparse24CompressArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status = check_sizes("sparse24_compress", N, K, args.weight_dtype); !status.ok()) return status;
  const Sparse24Problem p = problem_of(N, K, args.weight, args.mask, args.values, args.metadata);
  return launch_threads("sparse24_compress", LORS_KERNEL(sparse24_compress_kernel, args.weight_dtype), p, N * p.bytes, host);
}

Status sparse24_decompress(const Sparse24DecompressArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status = check_sizes("sparse24_decompress", N, K, args.dtype); !status.ok()) return status;
  const Sparse24Problem p = problem_of(N, K, args.weight, nullptr, args.values, args.metadata);
  return launch_threads("sparse24_decompress", LORS_KERNEL(sparse24_decompress_kernel, args.dtype), p, N * p.bytes, host);
}

Status sparse24_mask(const Sparse24MaskArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status = check_sizes("sparse24_mask", N, K, DType::float32); !status.ok()) return status;
  Sparse24Problem p = problem_of(N, K, nullptr, nullptr, nullptr, args.metadata);
  p.bits = args.mask;
  return launch_threads("sparse24_mask", sparse24_mask_kernel, p, N * mask_words(K), host);
}

Status sparse24_validate(const Sparse24ValidateArgs& args, const CudaHost& host) {
  const int64_t N = args.out_features, K = args.in_features;
  if (Status status = check_sizes("sparse24_validate", N, K, args.dtype); !status.ok()) return status;
  const Sparse24Problem p = problem_of(N, K, nullptr, nullptr, args.values, args.metadata);
  return launch_tallied<2>("sparse24_validate", LORS_KERNEL(sparse24_validate_kernel, args.dtype), p, N * p.bytes, args.report,
                           host);
}

}  // namespace lors
