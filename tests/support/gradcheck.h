// SPDX-License-Identifier: MIT
#pragma once

#include "tolerances.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace memcnn_test {

namespace detail {

/// The gradients that autograd finds, as flat float64 tensors on the CPU.
inline std::vector<torch::Tensor> analytic_gradients(
    const torch::Tensor& output,
    const torch::Tensor& weights,
    const std::vector<torch::Tensor>& leaves) {
  std::vector<torch::Tensor> gradients = torch::autograd::grad(
      {output},
      leaves,
      {weights},
      /*retain_graph=*/std::nullopt,
      /*create_graph=*/false,
      /*allow_unused=*/true);
  for (size_t i = 0; i < leaves.size(); ++i) {
    gradients[i] = gradients[i].defined()
        ? gradients[i].to(torch::kCPU).contiguous().view({-1})
        : torch::zeros({leaves[i].numel()}, torch::kDouble);
  }
  return gradients;
}

/// The central difference of a value with respect to an entry, which is put
/// back.
inline double difference(
    const std::function<double()>& value,
    torch::Tensor entry) {
  const double start = entry.item<double>();
  entry.fill_(start + kDifferenceStep);
  const double above = value();
  entry.fill_(start - kDifferenceStep);
  const double below = value();
  entry.fill_(start);
  return (above - below) / (2 * kDifferenceStep);
}

} // namespace detail

/// Compares the gradients of a function, by autograd, with central differences.
///
/// The function computes one float64 tensor from leaves that it refers to:
/// inputs and parameters, which are moved a little, entry by entry, and put
/// back. It must return the same for the same leaves: no random numbers.
inline testing::AssertionResult gradcheck(
    const std::function<torch::Tensor()>& function,
    const std::vector<torch::Tensor>& leaves) {
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (leaves[i].scalar_type() != torch::kDouble || !leaves[i].is_leaf() ||
        !leaves[i].requires_grad() || !leaves[i].is_contiguous()) {
      return testing::AssertionFailure()
          << "gradcheck needs contiguous float64 leaves that require a "
             "gradient; leaf "
          << i << " is none";
    }
  }
  const torch::Tensor output = function();
  // Weights for a scalar that depends on every entry in its own way.
  const torch::Tensor weights =
      torch::linspace(
          0.5, 1.5, output.numel(), output.options().requires_grad(false))
          .cos()
          .view(output.sizes());
  const auto analytic = detail::analytic_gradients(output, weights, leaves);
  const auto value = [&] {
    const torch::NoGradGuard no_grad;
    return (function() * weights).sum().item<double>();
  };
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (analytic[i].numel() != leaves[i].numel()) {
      return testing::AssertionFailure()
          << "the gradient of leaf " << i << " has " << analytic[i].numel()
          << " entries, the leaf " << leaves[i].sizes();
    }
    const torch::Tensor flat = leaves[i].data().view({-1});
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const double numeric = detail::difference(value, flat[j]);
      const double found = analytic[i][j].item<double>();
      const double bound =
          kDifferenceAbsolute + kDifferenceRelative * std::abs(numeric);
      if (!(std::abs(found - numeric) <= bound)) { // also where one is NaN
        return testing::AssertionFailure()
            << "leaf " << i << " (sizes " << leaves[i].sizes() << "), entry "
            << j << ": the gradient is " << found << ", differences say "
            << numeric << " (allowed: " << bound << " apart)";
      }
    }
  }
  return testing::AssertionSuccess();
}

} // namespace memcnn_test
