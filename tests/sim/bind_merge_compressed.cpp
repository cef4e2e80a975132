// SPDX-License-Identifier: Apache-2.0
// From a compressed weight to a dense one: merge, in bind_merge.cpp.
#include <lors/sparse24.h>

#include "bind.h"

LORS_SIM_BINDING(merge_compressed) {
  using namespace lors;
  m.def("sparse24_merge", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24MergeArgs args;
    given.read("out_features", args.out_features);
    sim::read_adapters(given, args);
    given.read("values", args.values);
    given.read("dtype", args.dtype);
    given.read("metadata", args.metadata);
    given.read("merged_values", args.merged_values);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_merge(args, host); });
  });
}
