// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

namespace training {

/// Tensor memory of a training step in bytes, beyond what parameters, momentum
/// and the batch itself take.
struct MemoryUse {
  int64_t held_after_forward = 0; // what waits for backward
  int64_t peak = 0; // at any time, gradients included

  /// Keeps the larger of each.
  void include(const MemoryUse& other) {
    held_after_forward = std::max(held_after_forward, other.held_after_forward);
    peak = std::max(peak, other.peak);
  }
};

inline double to_mebibytes(int64_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

} // namespace training
