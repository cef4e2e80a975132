// SPDX-License-Identifier: Apache-2.0
// The result of a core call: success, or an error message that says what was given, what is needed and what to do.
#pragma once

#include <string>
#include <utility>

namespace lors {

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status error(std::string message) { return Status(std::move(message)); }

  bool ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  explicit Status(std::string message) : message_(std::move(message)) {}
  std::string message_;
};

}  // namespace lors
