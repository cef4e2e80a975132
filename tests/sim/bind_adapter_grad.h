// SPDX-License-Identifier: Apache-2.0
// The fields that both kinds of adapter gradients take.
#pragma once

#include <lors/adapter_grad.h>

#include "bind.h"

namespace lors::sim {

inline void read(Arguments& given, AdapterGradArgs& args) {
  given.read("tokens", args.tokens);
  given.read("out_features", args.out_features);
  read_adapters(given, args);
  given.read("grad_output", args.grad_output);
  given.read("grad_output_dtype", args.grad_output_dtype);
  given.read("input", args.input);
  given.read("input_dtype", args.input_dtype);
  given.read("lora_A_grad", args.lora_A_grad);
  given.read("lora_B_grad", args.lora_B_grad);
}

}  // namespace lors::sim
