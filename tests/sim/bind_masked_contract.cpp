// SPDX-License-Identifier: Apache-2.0
#include <lors/adapter_grad.h>

#include "bind.h"

LORS_SIM_BINDING(masked_contract) {
  using namespace lors;
  m.def("masked_contract", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MaskedContractArgs args;
    given.read("rows", args.rows);
    sim::read_adapters(given, args);
    given.read("grad_weight", args.grad_weight);
    given.read("grad_weight_dtype", args.grad_weight_dtype);
    sim::read_weight(given, args);
    given.read("lora_A_sum", args.lora_A_sum);
    given.read("lora_B_grad", args.lora_B_grad);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return masked_contract(args, host); });
  });
}
