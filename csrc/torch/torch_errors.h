// SPDX-License-Identifier: Apache-2.0
// Adds torch's reason to errors of its stable ABI (out of memory, for example). Before torch 2.13 the ABI reports only the name
// of the failed call and writes the reason to stderr; since 2.13 the reason can be queried.
#pragma once

#include <stdexcept>
#include <string>

// In torch >= 2.13. Weak: null in older versions, which this binary supports too.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace lors::binding {

// Why torch's last call failed, in torch's words; empty where it keeps none.
inline std::string torch_reason() {
  const char* reason = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return reason == nullptr ? "" : reason;
}

[[noreturn]] inline void rethrow_explained(const std::runtime_error& error) {
  const std::string message = error.what();
  // The text of TORCH_ERROR_CODE_CHECK, which our own messages never contain.
  if (message.find(" API call failed at ") == std::string::npos) throw std::runtime_error(message);
  const std::string reason = torch_reason();
  if (reason.empty())
    throw std::runtime_error("torch failed inside an operator of lors_cuda; its reason is on stderr. (" + message + ")");
  throw std::runtime_error("torch failed inside an operator of lors_cuda: " + reason);
}

template <auto op, typename Function = decltype(op)>
struct Explained;

template <auto op, typename Result, typename... Arguments>
struct Explained<op, Result (*)(Arguments...)> {
  static Result call(Arguments... arguments) {
    try {
      return op(arguments...);
    } catch (const std::runtime_error& error) {
      rethrow_explained(error);
    }
  }
};

// `op` with errors of torch explained.
template <auto op>
inline constexpr auto& explained = Explained<op>::call;

}  // namespace lors::binding
