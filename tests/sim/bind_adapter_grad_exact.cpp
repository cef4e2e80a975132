// SPDX-License-Identifier: Apache-2.0
#include "bind_adapter_grad.h"

LORS_SIM_BINDING(adapter_grad_exact) {
  using namespace lors;
  m.def("adapter_grad_exact", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    AdapterGradExactArgs args;
    sim::read(given, args);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return adapter_grad_exact(args, host); });
  });
  m.def("masked_contract", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MaskedContractArgs args;
    given.read("rows", args.rows);
    given.read("in_features", args.in_features);
    given.read("r", args.r);
    given.read("grad_weight", args.grad_weight);
    given.read("grad_weight_dtype", args.grad_weight_dtype);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    given.read("lora_A", args.lora_A);
    given.read("lora_A_dtype", args.lora_A_dtype);
    given.read("lora_B", args.lora_B);
    given.read("lora_B_dtype", args.lora_B_dtype);
    given.read("scaling", args.scaling);
    given.read("lora_A_sum", args.lora_A_sum);
    given.read("lora_B_grad", args.lora_B_grad);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return masked_contract(args, host); });
  });
}
