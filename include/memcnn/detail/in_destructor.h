// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Exception.h>

#include <exception>

namespace memcnn::detail {

/// Runs what puts things back at the end of a scope. An error there (of a
/// device that is lost, say) must not end the program: it is a warning.
template <class Fn>
void in_destructor(Fn&& put_back) noexcept {
  try {
    put_back();
  } catch (const std::exception& error) {
    TORCH_WARN("memcnn: could not put back what was found: ", error.what());
  }
}

} // namespace memcnn::detail
