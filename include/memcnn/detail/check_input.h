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

/// Stops where a tensor has no channels either.
inline void check_has_channels(
    const std::string& place,
    const at::Tensor& input) {
  check_floating_point(place, input);
  TORCH_CHECK_VALUE(
      input.dim() >= 2,
      place,
      "expected an input (N, C, *), samples and then channels, but got ",
      describe(input),
      ". Add the missing dimension with unsqueeze().");
}

} // namespace memcnn::detail
