// SPDX-License-Identifier: Apache-2.0
#include <lors/fused_linear.h>

#include "bind.h"

LORS_SIM_BINDING(fused_linear) {
  using namespace lors;
  m.def("fused_linear", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    FusedLinearArgs args;
    given.read("tokens", args.tokens);
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("r", args.r);
    given.read("input_gradient", args.input_gradient);
    given.read("activation", args.activation);
    given.read("activation_dtype", args.activation_dtype);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    given.read("lora_A", args.lora_A);
    given.read("lora_A_dtype", args.lora_A_dtype);
    given.read("lora_B", args.lora_B);
    given.read("lora_B_dtype", args.lora_B_dtype);
    given.read("scaling", args.scaling);
    given.read("round_to", args.round_to);
    given.read("bias", args.bias);
    given.read("bias_dtype", args.bias_dtype);
    given.read("output", args.output);
    given.read("output_dtype", args.output_dtype);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return fused_linear(args, host); });
  });
}
