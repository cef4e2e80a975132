// SPDX-License-Identifier: Apache-2.0
// The Python module of one flavour; everything in it comes from the bind_*.cpp that were linked.
#include "bind.h"
#include "runtime/sim_error.h"

PYBIND11_MODULE(LORS_SIM_MODULE, m) {
  pybind11::register_exception<lors::sim::Error>(m, "SimError");
  pybind11::register_exception<lors::sim::StatusError>(m, "StatusError");
  for (const lors::sim::Binding binding : lors::sim::bindings()) binding(m);
}
