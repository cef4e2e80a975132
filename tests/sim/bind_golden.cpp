// SPDX-License-Identifier: Apache-2.0
// The probes of tests/golden on the simulator.
#include "../golden/probes.cuh"

#include "bind.h"

LORS_SIM_BINDING(golden) {
  using namespace lors;
  m.attr("golden_shape") = pybind11::make_tuple(golden::kLanes, golden::kInputs, golden::kOutputs);
  m.def("golden_probes", [] {
    pybind11::list all;  // of (name, whether it is a sum)
    for (int i = 0; i < golden::kProbes; ++i) all.append(pybind11::make_tuple(golden::kNames[i], golden::kSums[i]));
    return all;
  });
  m.def("golden_input", [](int probe, uint32_t seed) {
    pybind11::array_t<uint32_t> words(static_cast<pybind11::ssize_t>(golden::kLanes * golden::kInputs));
    golden::make_inputs(probe, seed, words.mutable_data());
    return words;
  });
  m.def("golden_run", [](sim::Device& device, int probe, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    const uint32_t* in = nullptr;
    uint32_t* out = nullptr;
    given.read("input", in);
    given.read("output", out);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return golden::run_probe(probe, in, out, host); });
  });
}
