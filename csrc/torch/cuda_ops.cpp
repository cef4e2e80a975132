// SPDX-License-Identifier: Apache-2.0
// The CUDA half of the operators: a library of its own (_ops_cuda.so), loaded only beside a CUDA torch of the same CUDA major.
#include <lors/cuda_device.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace lors::binding {
namespace {

std::string cuda_device_problem(int64_t index) { return cuda_device_supported(static_cast<int>(index)).message(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lors, m) {
  m.def("cuda_device_problem(int index) -> str");  // why this build cannot use the device; empty if it can
}

STABLE_TORCH_LIBRARY_IMPL(lors, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_problem", TORCH_BOX(&cuda_device_problem));
}

}  // namespace lors::binding
