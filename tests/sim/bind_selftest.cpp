// SPDX-License-Identifier: Apache-2.0
#include "selftest.h"

#include "bind.h"

LORS_SIM_BINDING(selftest) {
  using namespace lors;
  m.def("selftest", [](sim::Device& device, const std::string& kernel, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    sim::SelfTest test;
    int64_t n = 0, blocks = 1, threads = 32, shared_bytes = 0, cluster = 1;
    given.read("input", test.in);
    given.read("output", test.out);
    given.read("n", n);
    given.read("blocks", blocks);
    given.read("threads", threads);
    given.read("shared_bytes", shared_bytes);
    given.read("cluster", cluster);
    given.finish();
    test.kernel = kernel;
    test.n = static_cast<int>(n);
    test.blocks = static_cast<unsigned>(blocks);
    test.threads = static_cast<unsigned>(threads);
    test.shared_bytes = static_cast<int>(shared_bytes);
    test.cluster = static_cast<unsigned>(cluster);
    sim::call(device, [&](const CudaHost& host) { return sim::selftest(test, host); });
  });
}
