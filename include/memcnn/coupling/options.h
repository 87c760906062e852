// SPDX-License-Identifier: MIT
#pragma once

#include <torch/arg.h>

#include <cstdint>

namespace memcnn {

/// Options of a coupling and of its adapters; what they say is fixed once the
/// module is constructed.
struct CouplingOptions {
  /// Dimension along which the input is split into halves; negative values
  /// count from the end. Default: 1, the channels of (N, C, *).
  TORCH_ARG(int64_t, split_dim) = 1;
};

} // namespace memcnn
