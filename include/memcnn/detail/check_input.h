// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace memcnn::detail {

/// Stops where a tensor is none that a layer or a coupling can map. `place`
/// begins the message.
inline void check_floating_point(
    const std::string& place,
    const at::Tensor& input) {
  TORCH_CHECK_VALUE(
      input.defined(),
      place,
      "expected a tensor, but got an undefined one. Pass a tensor of "
      "floating point values.");
  TORCH_CHECK_TYPE(
      input.is_floating_point(),
      place,
      "expected a tensor of floating point values, but got ",
      describe(input),
      ". Convert it with to(torch::kFloat).");
}

} // namespace memcnn::detail
