// SPDX-License-Identifier: MIT
#pragma once

#include "train/step/step_result.h"

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace training {

/// Which of the five highest logits is that of the right class, (N, 5), bool;
/// fewer of fewer classes.
inline torch::Tensor ranked_hits(
    const torch::Tensor& logits,
    const torch::Tensor& labels) {
  const int64_t count = std::min<int64_t>(5, logits.size(1));
  return std::get<1>(logits.detach().topk(count, 1)) == labels.unsqueeze(1);
}

/// Loss, hits and hits among the first five, (3), float64: one tensor, so that
/// one copy brings them to the CPU.
inline torch::Tensor figures_of(
    const torch::Tensor& loss,
    const torch::Tensor& hits) {
  return torch::stack(
      {loss.detach().to(torch::kFloat64),
       hits.select(1, 0).sum().to(torch::kFloat64),
       hits.sum().to(torch::kFloat64)});
}

/// The hits of figures_of(), on the CPU.
inline Hits hits_of(const torch::Tensor& figures) {
  const auto* values = figures.const_data_ptr<double>();
  return {static_cast<int64_t>(values[1]), static_cast<int64_t>(values[2])};
}

} // namespace training
