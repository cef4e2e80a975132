// SPDX-License-Identifier: Apache-2.0
#include <lors/bitmap.h>

#include "bind.h"

LORS_SIM_BINDING(bitmap) {
  using namespace lors;
  m.def("bitmap_offsets", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    BitmapOffsetsArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("bits", args.bits);
    given.read("row_offsets", args.row_offsets);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return bitmap_offsets(args, host); });
  });
  m.def("bitmap_compress", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    BitmapCompressArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("weight", args.weight);
    given.read("dtype", args.dtype);
    given.read("bits", args.bits);
    given.read("row_offsets", args.row_offsets);
    given.read("values", args.values);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return bitmap_compress(args, host); });
  });
  m.def("bitmap_decompress", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    BitmapDecompressArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("values", args.values);
    given.read("dtype", args.dtype);
    given.read("bits", args.bits);
    given.read("row_offsets", args.row_offsets);
    given.read("weight", args.weight);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return bitmap_decompress(args, host); });
  });
  m.def("bitmap_validate", [](sim::Device& device, const pybind11::kwargs& kwargs) {
    sim::Arguments given(kwargs);
    BitmapValidateArgs args;
    given.read("out_features", args.out_features);
    given.read("in_features", args.in_features);
    given.read("count", args.count);
    given.read("bits", args.bits);
    given.read("row_offsets", args.row_offsets);
    given.read("report", args.report);
    given.finish();
    sim::call(device, [&](const CudaHost& host) { return bitmap_validate(args, host); });
  });
}
