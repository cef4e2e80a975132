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
    sim::read_adapters(given, args);
    given.read("input_gradient", args.input_gradient);
    given.read("activation", args.activation);
    given.read("activation_dtype", args.activation_dtype);
    sim::read_weight(given, args);
    sim::read_layout(given, args);
    sim::read_quantization(given, args.quantization);
    sim::read_experts(given, args.experts);
    given.read("round_to", args.round_to);
    given.read("bias", args.bias);
    given.read("bias_dtype", args.bias_dtype);
    given.read("output", args.output);
    given.read("output_dtype", args.output_dtype);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return fused_linear(args, host); });
  });
}
