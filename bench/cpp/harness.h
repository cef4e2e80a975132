// SPDX-License-Identifier: Apache-2.0
// How a call of calls.h is measured by Google Benchmark: a poisoned first call, batches of at least 5 ms, and counters
// relative to a copy measured in the same process. bench/README.md says in words what each number counts.
#pragma once

#include <benchmark/benchmark.h>

#include <numeric>

#include "operand_sets.h"

namespace lors::bench {

// One row: poison, call, look for what was not written; warm up; then batches of at least kBatchSeconds.
template <typename Device>
void run(benchmark::State& state, Device& device, const Call<typename Device::Host>& call) {
  OperandSets<Device> sets(device, call.operands);
  Status status = poisoned_call(device, call, sets.first());
  const auto batch = [&](int64_t calls) {
    return device.seconds([&] {
      for (int64_t i = 0; i < calls && status.ok(); ++i) status = call.run(sets.next(), device.host());
    });
  };
  double fastest = 1;
  for (int i = 0; i < kWarmups && status.ok(); ++i) fastest = std::min(fastest, batch(1));
  // Once more with many calls in a row: a single one also measures how long an idle device takes to start.
  int64_t calls = std::clamp<int64_t>(static_cast<int64_t>(kBatchSeconds / fastest) + 1, 1, 100000);
  if (status.ok() && calls > 1)
    calls = std::clamp<int64_t>(static_cast<int64_t>(kBatchSeconds * static_cast<double>(calls) / batch(calls)) + 1, 1, 100000);
  if (!status.ok()) return state.SkipWithError(status.message().c_str());

  double seconds = 0;
  int64_t done = 0;
  while (state.KeepRunningBatch(calls)) {
    const double one = batch(calls);
    if (!status.ok()) return state.SkipWithError(status.message().c_str());
    state.SetIterationTime(one);
    seconds += one;
    done += calls;
  }
  seconds /= static_cast<double>(done);
  const double bytes = static_cast<double>(call.floor_bytes());
  state.counters["GB/s"] = bytes / seconds / 1e9;
  state.counters["GFLOP/s"] = call.flop / seconds / 1e9;
  state.counters["fraction_of_copy"] = bytes / seconds / copy_rate(device);
  state.counters["sets"] = static_cast<double>(sets.size());
}

// Registers every call of every shape and runs what the command line asks for.
template <typename Device>
int bench_main(int argc, char** argv, Device& device, const std::vector<std::pair<int64_t, int64_t>>& shapes,
               const std::vector<int64_t>& tokens, int64_t r) {
  using Host = typename Device::Host;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("copy_gb_per_second", std::to_string(copy_rate(device) / 1e9));
  benchmark::AddCustomContext("cache_bytes", std::to_string(device.cache_bytes()));
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const auto& [N, K] : shapes)
      for (const int64_t T : tokens)
        for (const Call<Host>& call : calls_of<Host>({T, N, K, r, dtype}, T == tokens.front())) {
          const bool has_tokens = call.name.starts_with("adapter_grad") || call.name.starts_with("fused_linear");
          std::string name = call.name + "/" + dtype_name(dtype) + "/" + std::to_string(N) + "x" + std::to_string(K);
          name += "/r" + std::to_string(r);
          if (has_tokens) name += "/T" + std::to_string(T);
          benchmark::RegisterBenchmark(name.c_str(), [&device, call](benchmark::State& state) { run(state, device, call); })
              ->UseManualTime()
              ->Unit(benchmark::kMicrosecond);
        }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace lors::bench
