// SPDX-License-Identifier: MIT
#pragma once

#include "train/step/memory_use.h"
#include "train/team/team.h"

#include <torch/types.h>

#include <cstdint>

namespace training {

/// The largest of all processes, each of which calls this.
inline MemoryUse largest_of_all(const MemoryUse& own, Team& team) {
  torch::Tensor table = torch::zeros({team.size(), 2}, torch::kFloat64);
  table[team.rank()][0] = own.held_after_forward;
  table[team.rank()][1] = own.peak;
  table = team.begin_sum(table.flatten())().view({-1, 2});
  MemoryUse largest;
  for (int64_t rank = 0; rank < team.size(); ++rank) {
    largest.include(
        {table[rank][0].item<int64_t>(), table[rank][1].item<int64_t>()});
  }
  return largest;
}

} // namespace training
