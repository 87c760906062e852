// SPDX-License-Identifier: MIT
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <optional>

namespace memcnn {

/// Options of a coupling, or of an adapter, which takes its coupling's without
/// any; what they say is fixed once the module is constructed.
struct CouplingOptions {
  /// Dimension along which the input is split into halves; negative values
  /// count from the end. Default: 1, the channels of (N, C, *).
  TORCH_ARG(int64_t, split_dim) = 1;
  /// The exact mode of an additive coupling: its input and the values of F and
  /// G are rounded to multiples of 2^-fractional_bits, gradients pass straight
  /// through, and reconstruction is exact at any depth while values stay below
  /// 2^(24 - fractional_bits) in float32 (53 in float64, 11 in float16, 8 in
  /// bfloat16). From 0 up to one less than that number of digits; 12 to 16 suit
  /// float32. Default: none, no rounding.
  TORCH_ARG(std::optional<int64_t>, fractional_bits) = std::nullopt;
};

} // namespace memcnn
