// SPDX-License-Identifier: Apache-2.0
#include <lors/sparse24.h>

#include "bind.h"

LORS_SIM_BINDING(sparse24) {
  using namespace lors;
  m.def("sparse24_inspect", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24InspectArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    int64_t* report = nullptr;
    given.read("report", report);
    args.report = reinterpret_cast<Sparse24Report*>(report);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_inspect(args, host); });
  });
  m.def("sparse24_compress", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24CompressArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("weight", args.weight);
    given.read("weight_dtype", args.weight_dtype);
    given.read("mask", args.mask);
    given.read("values", args.values);
    given.read("metadata", args.metadata);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_compress(args, host); });
  });
  m.def("sparse24_decompress", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24DecompressArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("values", args.values);
    given.read("dtype", args.dtype);
    given.read("metadata", args.metadata);
    given.read("weight", args.weight);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_decompress(args, host); });
  });
  m.def("sparse24_mask", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24MaskArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("metadata", args.metadata);
    given.read("mask", args.mask);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_mask(args, host); });
  });
  m.def("sparse24_validate", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    Sparse24ValidateArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("values", args.values);
    given.read("dtype", args.dtype);
    given.read("metadata", args.metadata);
    given.read("report", args.report);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return sparse24_validate(args, host); });
  });
}
