// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace training {

/// Which part of every batch a process computes: the images that follow those of
/// the process before it. All of them together are the batch.
struct Slice {
  int64_t rank = 0;
  int64_t ranks = 1; // by which the size of a batch is divisible

  int64_t size(int64_t batch_size) const {
    return batch_size / ranks;
  }

  int64_t first(int64_t batch_size) const {
    return rank * size(batch_size);
  }
};

} // namespace training
