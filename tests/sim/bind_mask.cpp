// SPDX-License-Identifier: Apache-2.0
#include <lors/sparse24.h>

#include "bind.h"

LORS_SIM_BINDING(mask) {
  using namespace lors;
  m.def("sparse24_mask", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24MaskArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("metadata", args.metadata);
    given.read("mask", args.mask);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_mask(args, host); });
  });
}
