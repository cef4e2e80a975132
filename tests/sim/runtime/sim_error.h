// SPDX-License-Identifier: Apache-2.0
// The exception that a failed Status becomes in Python.
#pragma once

#include <stdexcept>

namespace lors::sim {

struct StatusError : std::runtime_error {
  using runtime_error::runtime_error;
};

}  // namespace lors::sim
