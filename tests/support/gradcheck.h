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
  const auto analytic = torch::autograd::grad(
      {output},
      leaves,
      {weights},
      /*retain_graph=*/std::nullopt,
      /*create_graph=*/false,
      /*allow_unused=*/true);

  const auto value = [&] {
    const torch::NoGradGuard no_grad;
    return (function() * weights).sum().item<double>();
  };
  for (size_t i = 0; i < leaves.size(); ++i) {
    const torch::Tensor gradient = analytic[i].defined()
        ? analytic[i].to(torch::kCPU).contiguous().view({-1})
        : torch::zeros({leaves[i].numel()}, torch::kDouble);
    if (gradient.numel() != leaves[i].numel()) {
      return testing::AssertionFailure()
          << "the gradient of leaf " << i << " has sizes "
          << analytic[i].sizes() << ", the leaf " << leaves[i].sizes();
    }
    const torch::Tensor flat = leaves[i].data().view({-1});
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const torch::Tensor entry = flat[j];
      const double start = entry.item<double>();
      entry.fill_(start + kDifferenceStep);
      const double above = value();
      entry.fill_(start - kDifferenceStep);
      const double below = value();
      entry.fill_(start);
      const double numeric = (above - below) / (2 * kDifferenceStep);
      const double found = gradient[j].item<double>();
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
