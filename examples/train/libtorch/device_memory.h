// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/captured_step.h"

#include <torch/types.h>

#include <cstddef>
#include <cstdint>

namespace training {

/// Bytes of a GPU that LibTorch has taken by now, also those that are free for
/// later tensors, and those that a graph keeps for itself. 0 on a CPU.
inline int64_t taken_bytes([[maybe_unused]] torch::Device device) {
#if REVNET_HAS_CUDA_GRAPHS
  if (device.is_cuda()) {
    const auto index = torch::empty({0}, device).device().index();
    constexpr size_t kAll = 0; // of the allocator's kinds of memory
    return c10::cuda::CUDACachingAllocator::getDeviceStats(index)
        .reserved_bytes[kAll]
        .current;
  }
#endif
  return 0;
}

} // namespace training
