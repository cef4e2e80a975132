// SPDX-License-Identifier: Apache-2.0
// Runs every probe on the GPU of this machine and prints the results as JSON. README.md says how to build it and where to keep
// the output.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "probes.cuh"

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "golden_record: %s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
  std::exit(1);
}

}  // namespace

int main() {
  using namespace lors::golden;
  constexpr int kSeeds = 16;
  cudaDeviceProp device{};
  int driver = 0, runtime = 0;
  require(cudaGetDeviceProperties(&device, 0) == cudaSuccess, "no CUDA device answers");
  require(cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess, "no version");
  uint32_t in[kLanes * kInputs], out[kLanes * kOutputs], *device_in = nullptr, *device_out = nullptr;
  require(cudaMalloc(&device_in, sizeof in) == cudaSuccess && cudaMalloc(&device_out, sizeof out) == cudaSuccess, "cudaMalloc");

  char date[32] = "";
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  std::printf("{\"device\": \"%s\", \"architecture\": \"sm_%d%d\", \"driver\": %d, \"runtime\": %d, \"date\": \"%s\",\n",
              device.name, device.major, device.minor, driver, runtime, date);
  std::printf(" \"probes\": {");
  const bool clusters = lors::cuda::has_clusters(10 * device.major + device.minor);
  for (int probe = 0; probe < kProbes; ++probe) {
    if (needs_clusters(probe) && !clusters) continue;
    std::printf("%s\n  \"%s\": {", probe ? "," : "", kNames[probe]);
    for (uint32_t seed = 1; seed <= kSeeds; ++seed) {
      make_inputs(probe, seed, in);
      require(cudaMemcpy(device_in, in, sizeof in, cudaMemcpyHostToDevice) == cudaSuccess, "copying the inputs");
      require(cudaMemset(device_out, 0xa5, sizeof out) == cudaSuccess, "poisoning the outputs");
      const lors::Status status = run_probe(probe, device_in, device_out, lors::CudaHost{});
      if (!status.ok()) {
        std::fprintf(stderr, "golden_record: %s\n", status.message().c_str());
        return 1;
      }
      require(cudaMemcpy(out, device_out, sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess, kNames[probe]);
      std::printf("%s\n   \"%u\": \"", seed > 1 ? "," : "", seed);
      for (const uint32_t word : out) std::printf("%08x", word);
      std::printf("\"");
    }
    std::printf("}");
  }
  std::printf("}}\n");
  return 0;
}
