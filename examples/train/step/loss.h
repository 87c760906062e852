// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/functional/loss.h>
#include <torch/types.h>

namespace training {

/// What training makes small: the cross-entropy, mean over the batch, in float32
/// where the network computed in less.
inline torch::Tensor loss_of(
    const torch::Tensor& logits,
    const torch::Tensor& labels) {
  return torch::nn::functional::cross_entropy(
      at::isReducedFloatingType(logits.scalar_type())
          ? logits.to(torch::kFloat32)
          : logits,
      labels);
}

} // namespace training
