// SPDX-License-Identifier: Apache-2.0
#include <lors/merge.h>

#include "bind.h"

LORS_SIM_BINDING(merge) {
  using namespace lors;
  m.def("merge", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MergeArgs args;
    given.read("out_features", args.out_features);
    sim::read_adapters(given, args);
    sim::read_weight(given, args);
    sim::read_layout(given, args);
    sim::read_quantization(given, args.quantization);
    bool to_sparse24 = false;
    given.read("to_sparse24", to_sparse24);
    if (to_sparse24) args.merged_layout = Layout::sparse24;
    bool to_bitmap = false;
    given.read("to_bitmap", to_bitmap);
    if (to_bitmap) args.merged_layout = Layout::bitmap;
    given.read("merged", args.merged);
    given.read("merged_dtype", args.merged_dtype);
    given.read("round_to", args.round_to);
    int64_t rounding_seed = -1, noise_seed = 0;
    given.read("rounding_seed", rounding_seed);
    given.read("noise_seed", noise_seed);
    given.read("noise", args.draws.noise);
    args.draws.rounds = rounding_seed >= 0;
    args.draws.rounding_seed = static_cast<uint64_t>(rounding_seed);
    args.draws.noise_seed = static_cast<uint64_t>(noise_seed);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return merge(args, host); });
  });
}
