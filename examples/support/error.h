// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace support {

/// What the user can put right: the program prints the message, nothing more.
///
/// Messages read "expected <what> to <relation>, but got <value>. <What to
/// do>."
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What an error says to the user: of LibTorch's, without the backtrace.
inline std::string message_of(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  return of_torch ? of_torch->what_without_backtrace() : error.what();
}

} // namespace support
