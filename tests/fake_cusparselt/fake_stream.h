// SPDX-License-Identifier: Apache-2.0
// What stands for a CUDA stream where there is no GPU: the fake runtime (tests/python/fake_cuda/runtime.h) and the fake
// cuSPARSELt both find it behind the stream's pointer. Work is done at once; time passes only when a fake says that it does.
#pragma once

struct FakeStream {
  double milliseconds = 0;  // what events read
  bool capturing = false;
  int waits = 0;  // how often the host waited for it
};
