// SPDX-License-Identifier: Apache-2.0
// For bind_<family>.cpp: how a function of the core is called from Python on a simulated device. See README.md.
#pragma once

#include <lors/quantization.h>
#include <lors/status.h>
#include <lors/types.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "runtime/device.h"

namespace lors::sim {

namespace py = pybind11;

// A buffer of a device as Python holds it, or a place inside one.
struct BufferHandle {
  Device* device = nullptr;
  int index = 0;
  int64_t offset = 0;
  py::dtype dtype;
  std::vector<py::ssize_t> shape;

  const Buffer& buffer() const { return device->memory.buffers()[static_cast<size_t>(index)]; }
  uint64_t address() const { return buffer().address + static_cast<uint64_t>(offset); }
};

// The keyword arguments of a call, read field by field; a field that is not given keeps its value.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : left_(py::dict(given.attr("copy")())) {}

  void read(const char* name, int64_t& field) { take(name, field); }
  void read(const char* name, double& field) { take(name, field); }
  void read(const char* name, bool& field) { take(name, field); }
  void read(const char* name, DType& field);
  void read(const char* name, Grid& field);
  // A buffer, or None for null.
  template <typename T>
  void read(const char* name, T*& field) {
    uint64_t address = 0;
    if (read_address(name, address)) field = reinterpret_cast<T*>(address);
  }
  // Refuses what no field has read.
  void finish() const;

 private:
  template <typename T>
  void take(const char* name, T& field) {
    if (left_.contains(name)) field = left_.attr("pop")(name).cast<T>();
  }
  bool read_address(const char* name, uint64_t& address);

  py::dict left_;
};

// What the argument structs of several families have in common.
template <typename Args>
void read_adapters(Arguments& given, Args& args) {
  given.read("in_features", args.in_features);
  given.read("r", args.r);
  given.read("lora_A", args.lora_A);
  given.read("lora_A_dtype", args.lora_A_dtype);
  given.read("lora_B", args.lora_B);
  given.read("lora_B_dtype", args.lora_B_dtype);
  given.read("scaling", args.scaling);
}
template <typename Args>
void read_weight(Arguments& given, Args& args) {
  given.read("weight", args.weight);
  given.read("weight_dtype", args.weight_dtype);
  given.read("mask", args.mask);
}

// A compressed weight is given by what only its layout has.
template <typename Args>
void read_layout(Arguments& given, Args& args) {
  given.read("metadata", args.metadata);
  given.read("row_offsets", args.row_offsets);
  args.weight_layout = args.metadata ? Layout::sparse24 : args.row_offsets ? Layout::bitmap : Layout::dense;
}

inline void read_quantization(Arguments& given, Quantization& q) {
  given.read("grid", q.grid);
  given.read("group", q.group);
  given.read("scales", q.scales);
  given.read("scales_dtype", q.scales_dtype);
  given.read("zero_points", q.zero_points);
  given.read("requantize_steps", q.requantize_steps);
  given.read("dither_seed", q.dither_seed);
  given.read("first_row", q.first_row);
}

inline void read_experts(Arguments& given, Experts& experts) {
  given.read("experts", experts.count);
  given.read("offsets", experts.offsets);
  given.read("rows", experts.gather);
  given.read("first", experts.first);
  given.read("last", experts.last);
}

template <typename Args>
void read_adapter_grad(Arguments& given, Args& args) {
  given.read("tokens", args.tokens);
  given.read("out_features", args.out_features);
  read_adapters(given, args);
  read_experts(given, args.experts);
  given.read("grad_output", args.grad_output);
  given.read("grad_output_dtype", args.grad_output_dtype);
  given.read("input", args.input);
  given.read("input_dtype", args.input_dtype);
  given.read("lora_A_grad", args.lora_A_grad);
  given.read("lora_B_grad", args.lora_B_grad);
}

// The caller's side of a call: its memory comes from the current device and has to be given back.
CudaHost host_of(Device& device);
// Raises StatusError unless the status is success, and Error if the call kept memory.
void check(Device& device, const Status& status);

// Calls function(host) with the device made current.
template <typename Function>
void call(Device& device, Function function) {
  const UseDevice in_use(device);
  check(device, function(host_of(device)));
}

// Bindings register themselves: LORS_SIM_BINDING(family) { m.def("name", ...); }
using Binding = void (*)(py::module_& m);
std::vector<Binding>& bindings();
struct Registration {
  explicit Registration(Binding binding) { bindings().push_back(binding); }
};
#define LORS_SIM_BINDING(family)                                                   \
  static void bind_##family(pybind11::module_& m);                                 \
  static const ::lors::sim::Registration registration_of_##family(&bind_##family); \
  static void bind_##family(pybind11::module_& m)

}  // namespace lors::sim
