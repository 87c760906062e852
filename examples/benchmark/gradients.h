// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/types.h>

#include <cmath>
#include <cstddef>
#include <vector>

namespace benchmark {

inline void forget_gradients(std::vector<at::Tensor>& parameters) {
  for (at::Tensor& parameter : parameters) {
    parameter.mutable_grad() = at::Tensor();
  }
}

/// Copies; zeros where a parameter has none.
inline std::vector<at::Tensor> gradients_of(
    const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& parameter : parameters) {
    const at::Tensor& gradient = parameter.grad();
    copies.push_back(
        gradient.defined() ? gradient.clone() : at::zeros_like(parameter));
  }
  return copies;
}

/// Norm of the difference by the norm of what was expected, over all tensors.
inline double relative_error(
    const std::vector<at::Tensor>& found,
    const std::vector<at::Tensor>& expected) {
  const auto squares = [](const at::Tensor& values) {
    return values.square().sum().item<double>();
  };
  double difference = 0;
  double all = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const at::Tensor truth = expected[i].to(at::kDouble);
    difference += squares(found[i].to(at::kDouble) - truth);
    all += squares(truth);
  }
  return std::sqrt(difference / all);
}

} // namespace benchmark
