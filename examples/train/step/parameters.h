// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace training {

/// Of all parameters of a module; waits for their device once.
inline bool all_finite(const torch::nn::Module& network) {
  std::vector<torch::Tensor> flawed;
  for (const torch::Tensor& weights : network.parameters()) {
    flawed.push_back(torch::isfinite(weights).logical_not().any());
  }
  return !torch::stack(flawed).any().item<bool>();
}

inline int64_t count_of_parameters(const torch::nn::Module& network) {
  int64_t count = 0;
  for (const auto& parameter : network.parameters()) {
    count += parameter.numel();
  }
  return count;
}

inline int64_t bytes_of_parameters(const torch::nn::Module& network) {
  int64_t bytes = 0;
  for (const auto& parameter : network.parameters()) {
    bytes += static_cast<int64_t>(parameter.nbytes());
  }
  return bytes;
}

} // namespace training
