// SPDX-License-Identifier: Apache-2.0
// Launches a kernel of selftest.cu by name.
#pragma once

#include <lors/status.h>
#include <lors/types.h>

#include <string>

namespace lors::sim {

struct SelfTest {
  std::string kernel;
  const void* in = nullptr;
  void* out = nullptr;
  int n = 0;
  unsigned blocks = 1, threads = 32, cluster = 1;
  int shared_bytes = 0;
};

Status selftest(const SelfTest& test, const CudaHost& host);

}  // namespace lors::sim
