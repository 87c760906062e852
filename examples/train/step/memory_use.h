// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

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

/// Measures what a step takes from here on, beside gradients that are there for
/// good.
class MemoryWatch final {
 public:
  MemoryWatch(memcnn::AllocationMeter& meter, int64_t standing_gradients)
      : meter_(meter),
        standing_gradients_(standing_gradients),
        before_(meter.held_bytes()) {
    meter.reset_peak();
  }

  void note_end_of_forward() {
    held_ = meter_.held_bytes() - before_;
  }

  MemoryUse use() const {
    return {held_, meter_.peak_bytes() - before_ + standing_gradients_};
  }

 private:
  memcnn::AllocationMeter& meter_;
  int64_t standing_gradients_;
  int64_t before_;
  int64_t held_ = 0;
};

} // namespace training
