// SPDX-License-Identifier: Apache-2.0
#include <lors/mask.h>

#include "bind.h"

LORS_SIM_BINDING(mask) {
  using namespace lors;
  m.def("mask_pack", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MaskPackArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("mask", args.mask);
    given.read("bits", args.bits);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return mask_pack(args, host); });
  });
  m.def("mask_unpack", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MaskUnpackArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("bits", args.bits);
    given.read("mask", args.mask);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return mask_unpack(args, host); });
  });
  m.def("mask_nonzero", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    MaskNonzeroArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("weight", args.weight);
    given.read("dtype", args.dtype);
    given.read("bits", args.bits);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return mask_nonzero(args, host); });
  });
}
