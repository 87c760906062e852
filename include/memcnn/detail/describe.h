// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/StringUtil.h>

#include <string>

namespace memcnn::detail {

/// Says what a tensor is, for error messages: "sizes [2, 3], Float, cpu".
inline std::string
describe(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  return c10::str("sizes ", sizes, ", ", dtype, ", ", device);
}

inline std::string describe(const at::Tensor& tensor) {
  return tensor.defined()
      ? describe(tensor.sizes(), tensor.scalar_type(), tensor.device())
      : "undefined tensor";
}

/// A flag, as options print it.
inline const char* yes_no(bool value) {
  return value ? "true" : "false";
}

} // namespace memcnn::detail
