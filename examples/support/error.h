// SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>

namespace support {

/// What the user can put right: the program prints the message, nothing more.
///
/// Messages read "expected <what> to <relation>, but got <value>. <What to
/// do>."
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

} // namespace support
