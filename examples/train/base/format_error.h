// SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>

namespace training {

/// What is wrong with the bytes of a file: a clause, such as "its pickle is
/// corrupt", for the reader that knows the file to put after "expected ..., but".
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

} // namespace training
