// SPDX-License-Identifier: Apache-2.0
// What Python sees of a Status that is not success.
#pragma once

#include <stdexcept>

namespace lors::sim {

struct StatusError : std::runtime_error {
  using runtime_error::runtime_error;
};

}  // namespace lors::sim
