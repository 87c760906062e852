// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <string>

namespace memcnn::detail {

/// Says what a tensor is, for error messages: "sizes [2, 3], Float, cpu".
inline std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return "undefined tensor";
  }
  return c10::str(
      "sizes ",
      tensor.sizes(),
      ", ",
      tensor.scalar_type(),
      ", ",
      tensor.device());
}

/// A flag, as options print it.
inline const char* yes_no(bool value) {
  return value ? "true" : "false";
}

} // namespace memcnn::detail
