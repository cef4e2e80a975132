// SPDX-License-Identifier: Apache-2.0
// The fields that both kinds of adapter gradients take.
#pragma once

#include <lors/adapter_grad.h>

#include "bind.h"

namespace lors::sim {

inline void read(Arguments& given, AdapterGradArgs& args) {
  given.read("tokens", args.tokens);
  given.read("out_features", args.out_features);
  given.read("in_features", args.in_features);
  given.read("r", args.r);
  given.read("grad_output", args.grad_output);
  given.read("grad_output_dtype", args.grad_output_dtype);
  given.read("input", args.input);
  given.read("input_dtype", args.input_dtype);
  given.read("lora_A", args.lora_A);
  given.read("lora_A_dtype", args.lora_A_dtype);
  given.read("lora_B", args.lora_B);
  given.read("lora_B_dtype", args.lora_B_dtype);
  given.read("scaling", args.scaling);
  given.read("lora_A_grad", args.lora_A_grad);
  given.read("lora_B_grad", args.lora_B_grad);
}

}  // namespace lors::sim
