// SPDX-License-Identifier: Apache-2.0
// The Python class Device: uploads, downloads, and the counters of its launches.
#include <pybind11/stl.h>

#include <cstring>

#include "bind.h"
#include "runtime/sim_error.h"

namespace lors::sim {

std::vector<Binding>& bindings() {
  static std::vector<Binding> all;
  return all;
}

void Arguments::read(const char* name, DType& field) {
  if (!left_.contains(name)) return;
  const auto text = left_.attr("pop")(name).cast<std::string>();
  if (text == "float64") {
    field = DType::float64;
  } else if (text == "float32") {
    field = DType::float32;
  } else if (text == "bfloat16") {
    field = DType::bfloat16;
  } else if (text == "float16") {
    field = DType::float16;
  } else {
    throw py::value_error(std::string(name) + " is " + text + "; float64, float32, bfloat16 or float16, please");
  }
}
void Arguments::read(const char* name, Grid& field) {
  if (!left_.contains(name)) return;
  const auto text = left_.attr("pop")(name).cast<std::string>();
  if (text != "int8" && text != "int4" && text != "e4m3")
    throw py::value_error(std::string(name) + " is " + text + "; int8, int4 or e4m3, please");
  field = text == "int8" ? Grid::int8 : text == "int4" ? Grid::int4 : Grid::e4m3;
}

bool Arguments::read_address(const char* name, uint64_t& address) {
  if (!left_.contains(name)) return false;
  const py::object given = left_.attr("pop")(name);
  address = given.is_none() ? 0 : given.cast<const BufferHandle&>().address();
  return true;
}

void Arguments::finish() const {
  if (!left_.empty()) throw py::type_error("unknown arguments: " + py::str(left_.attr("keys")()).cast<std::string>());
}

namespace {

void* allocate(int64_t bytes, void** handle) {
  Device& device = *Device::current;
  if (bytes <= 0) throw Error("CudaHost.allocate was asked for " + std::to_string(bytes) + " bytes");
  const std::string name = "scratch " + std::to_string(device.scratch_buffers++);
  const int index = device.memory.allocate(name, bytes, 0, true);
  *handle = reinterpret_cast<void*>(static_cast<intptr_t>(index) + 1);
  device.scratch_in_use.insert(index);
  return reinterpret_cast<void*>(device.memory.buffers()[static_cast<size_t>(index)].address);
}

void release(void* handle) {
  Device& device = *Device::current;
  const int index = static_cast<int>(reinterpret_cast<intptr_t>(handle)) - 1;
  // Called from destructors too, where nothing may be thrown: reported after the call.
  if (device.scratch_in_use.erase(index) == 0)
    device.scratch_misuse = "CudaHost.release was given a handle that is not in use";
  else
    device.memory.release(index);
}

}  // namespace

CudaHost host_of(Device& device) {
  CudaHost host;
  host.stream = &device;
  host.allocate = allocate;
  host.release = release;
  return host;
}

void check(Device& device, const Status& status) {
  if (!status.ok()) throw StatusError(status.message());
  if (!device.scratch_misuse.empty()) throw Error(std::exchange(device.scratch_misuse, {}));
  if (!device.scratch_in_use.empty()) {
    const std::string name = device.memory.buffers()[static_cast<size_t>(*device.scratch_in_use.begin())].name;
    device.scratch_in_use.clear();
    throw Error("the call kept device memory: '" + name + "' was not released");
  }
}

namespace {

Landing landing(const std::string& text) {
  if (text == "early") return Landing::early;
  if (text == "late") return Landing::late;
  if (text == "random") return Landing::random;
  throw py::value_error("cp is '" + text + "'; early, late or random, please");
}

TensorCores tensor_cores(const std::string& text) {
  if (text == "ampere") return TensorCores::ampere;
  if (text == "hopper") return TensorCores::hopper;
  if (text == "rounded") return TensorCores::rounded;
  throw py::value_error("tensor_cores is '" + text + "'; ampere, hopper or rounded, please");
}

BufferHandle new_buffer(Device& device, const std::string& name, int64_t bytes, int misalign, bool poison) {
  BufferHandle handle;
  handle.device = &device;
  handle.index = device.memory.allocate(name, bytes, misalign, poison);
  handle.dtype = py::dtype::of<uint8_t>();
  handle.shape = {static_cast<py::ssize_t>(bytes)};
  return handle;
}

// The bytes [offset, offset + bytes) from the handle's place on.
uint8_t* bytes_of(const BufferHandle& handle, int64_t offset, int64_t bytes) {
  if (offset < 0 || bytes < 0 || handle.offset + offset + bytes > handle.buffer().bytes)
    throw py::index_error("bytes outside of '" + handle.buffer().name + "'");
  return handle.device->memory.backing(handle.address() + static_cast<uint64_t>(offset));
}

void write_bytes(const BufferHandle& handle, int64_t offset, const py::array& array) {
  const auto dense = py::array::ensure(array, py::array::c_style);
  std::memcpy(bytes_of(handle, offset, dense.nbytes()), dense.data(), static_cast<size_t>(dense.nbytes()));
}

BufferHandle upload(Device& device, const std::string& name, const py::array& array, int misalign) {
  BufferHandle handle = new_buffer(device, name, array.nbytes(), misalign, false);
  handle.dtype = array.dtype();
  handle.shape.assign(array.shape(), array.shape() + array.ndim());
  write_bytes(handle, 0, array);
  return handle;
}

py::array download(const BufferHandle& handle) {
  py::array result(handle.dtype, handle.shape);
  std::memcpy(result.mutable_data(), bytes_of(handle, 0, result.nbytes()), static_cast<size_t>(result.nbytes()));
  return result;
}

py::array read_bytes(const BufferHandle& handle, int64_t offset, int64_t bytes) {
  py::array_t<uint8_t> result(static_cast<py::ssize_t>(bytes));
  std::memcpy(result.mutable_data(), bytes_of(handle, offset, bytes), static_cast<size_t>(bytes));
  return result;
}

// Adds to what `into` holds.
void add(py::dict into, const char* name, uint64_t value) {
  const uint64_t before = into.contains(name) ? into[name].cast<uint64_t>() : 0;
  into[name] = before + value;
}

py::dict inner(py::dict outer, const py::object& name) {
  if (!outer.contains(name)) outer[name] = py::dict();
  return outer[name].cast<py::dict>();
}

void add_launch(const Device& device, const LaunchRecord& launch, py::dict into) {
  for_counters(launch.counters, [&](const char* name, uint64_t value) { add(into, name, value); });
  py::dict loads = inner(into, py::str("loads_by_width")), stores = inner(into, py::str("stores_by_width"));
  for (size_t i = 0; i < 5; ++i) {
    const py::int_ width(1 << i);
    loads[width] = py::int_(launch.counters.loads_by_width[i]) + (loads.contains(width) ? loads[width] : py::int_(0));
    stores[width] = py::int_(launch.counters.stores_by_width[i]) + (stores.contains(width) ? stores[width] : py::int_(0));
  }
  py::dict buffers = inner(into, py::str("buffers"));
  for (const auto& [index, traffic] : launch.traffic) {
    py::dict of = inner(buffers, py::str(device.memory.buffers()[static_cast<size_t>(index)].name));
    add(of, "sectors_read", traffic.sectors_read);
    add(of, "sectors_written", traffic.sectors_written);
    add(of, "unique_sectors_read", traffic.unique_sectors_read);
    add(of, "unique_sectors_written", traffic.unique_sectors_written);
    add(of, "bytes_read", traffic.bytes_read);
    add(of, "bytes_written", traffic.bytes_written);
  }
}

py::dict stats(const Device& device) {
  py::dict all;
  for (const LaunchRecord& launch : device.launches) {
    py::dict of = inner(all, py::str(launch.name));
    add(of, "launches", 1);
    add_launch(device, launch, of);
  }
  return all;
}

py::list launches(const Device& device) {
  py::list all;
  for (const LaunchRecord& launch : device.launches) {
    py::dict of;
    of["name"] = launch.name;
    of["grid"] = py::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z);
    of["block"] = py::make_tuple(launch.block.x, launch.block.y, launch.block.z);
    of["cluster"] = launch.cluster;
    of["shared_bytes"] = launch.shared_bytes;
    add_launch(device, launch, of);
    all.append(of);
  }
  return all;
}

}  // namespace

LORS_SIM_BINDING(device) {
  py::class_<BufferHandle>(m, "Buffer")
      .def_property_readonly("name", [](const BufferHandle& b) { return b.buffer().name; })
      .def_property_readonly("nbytes", [](const BufferHandle& b) { return b.buffer().bytes - b.offset; })
      .def_property_readonly("address", &BufferHandle::address)
      .def("__add__", [](const BufferHandle& b, int64_t bytes) {
        BufferHandle inside = b;
        inside.offset += bytes;
        return inside;
      });

  py::class_<Device>(m, "Device")
      .def(py::init([](uint64_t seed, double preempt, const std::string& cp, const std::string& cores, bool race, bool count,
                       int multiprocessors, int shared_bytes, int architecture, int sample_blocks) {
             Options options;
             options.seed = seed;
             options.preempt = preempt;
             options.copies = landing(cp);
             options.tensor_cores = tensor_cores(cores);
             options.race = race;
             options.count = count;
             options.multiprocessors = multiprocessors;
             options.shared_bytes = shared_bytes;
             options.architecture = architecture;
             options.sample_blocks = sample_blocks;
             return std::make_unique<Device>(options);
           }),
           py::kw_only(), py::arg("seed") = 1, py::arg("preempt") = 0.0, py::arg("cp") = "random",
           py::arg("tensor_cores") = "hopper", py::arg("race") = false, py::arg("count") = true, py::arg("multiprocessors") = 4,
           py::arg("shared_bytes") = 227 * 1024, py::arg("architecture") = 80, py::arg("sample_blocks") = 0)
      .def("upload", &upload, py::arg("name"), py::arg("array"), py::arg("misalign") = 0, py::keep_alive<0, 1>())
      .def(
          "empty",
          [](Device& device, const std::string& name, int64_t nbytes, int misalign, bool sparse) {
            return new_buffer(device, name, nbytes, misalign, !sparse);
          },
          py::arg("name"), py::arg("nbytes"), py::arg("misalign") = 0, py::arg("sparse") = false, py::keep_alive<0, 1>())
      .def("download", [](Device&, const BufferHandle& handle) { return download(handle); })
      .def("write", [](Device&, const BufferHandle& handle, int64_t offset,
                       const py::array& array) { write_bytes(handle, offset, array); })
      .def("read", [](Device&, const BufferHandle& handle, int64_t offset,
                      int64_t nbytes) { return read_bytes(handle, offset, nbytes); })
      .def("stats", &stats)
      .def("launches", &launches)
      .def("reset_stats", [](Device& device) { device.launches.clear(); });
}

}  // namespace lors::sim
