// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>

namespace memcnn {

/// What a map returned, and the logarithm of the volume that it changed.
struct WithLogDet {
  at::Tensor output;
  /// (N): for each sample of the batch, dimension 0, the natural logarithm of
  /// |det J|, J the Jacobian of the sample's output by its input; float64 of a
  /// float64 input, else float32.
  at::Tensor log_det;
};

/// What is known of the log-determinant of an invertible module.
enum class LogDet {
  kUnknown, ///< it does not say
  kZero, ///< it is 0: the module keeps volumes
  kSample ///< it has a value for each sample
};

/// A module with forward and inverse that derives from this tag as well says
/// that its log-determinant is 0 for every input, as that of a permutation is.
///
/// Example:
///   struct FlipImpl : torch::nn::Cloneable<FlipImpl>, memcnn::PreservesVolume {
///     torch::Tensor forward(torch::Tensor x) { return x.flip(1); }
///     torch::Tensor inverse(torch::Tensor y) { return y.flip(1); }
///     void reset() override {}
///   };
struct PreservesVolume {};

} // namespace memcnn
