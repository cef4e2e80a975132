// SPDX-License-Identifier: Apache-2.0
#include <lors/merge.h>

#include "bind.h"

LORS_SIM_BINDING(merge) {
  using namespace lors;
  m.def("merge", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MergeArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("r", args.r);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    given.read("lora_A", args.lora_A);
    given.read("lora_A_dtype", args.lora_A_dtype);
    given.read("lora_B", args.lora_B);
    given.read("lora_B_dtype", args.lora_B_dtype);
    given.read("scaling", args.scaling);
    given.read("merged", args.merged);
    given.read("merged_dtype", args.merged_dtype);
    given.read("round_to", args.round_to);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return merge(args, host); });
  });
}
