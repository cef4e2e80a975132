// SPDX-License-Identifier: Apache-2.0
#include <lors/adapter_grad.h>

#include "bind.h"

LORS_SIM_BINDING(adapter_grad_lors) {
  using namespace lors;
  m.def("adapter_grad_lors", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    AdapterGradArgs args;
    sim::read_adapter_grad(given, args);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return adapter_grad_lors(args, host); });
  });
}
