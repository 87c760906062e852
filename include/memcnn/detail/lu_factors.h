// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <limits>
#include <tuple>

namespace memcnn::detail {

/// The factors P L U of a square matrix, in float64: what its inverse and its
/// log-determinant follow from, for n^3 operations, without a wait for a device
/// (which slogdet() and inverse() may need).
class LuFactors {
 public:
  explicit LuFactors(const at::Tensor& matrix) {
    std::tie(lu_, pivots_, std::ignore) =
        at::linalg_lu_factor_ex(matrix.to(at::kDouble));
  }

  at::Tensor inverse() const {
    return at::linalg_lu_solve(
        lu_,
        pivots_,
        at::eye(lu_.size(-1), lu_.options().requires_grad(false)));
  }

  /// log |det|, ().
  at::Tensor log_abs_det() const {
    return lu_.diagonal().abs().log().sum();
  }

  /// Whether rounding is all that is left of a pivot. Waits for a device.
  bool is_singular() const {
    const at::Tensor pivots = lu_.detach().diagonal().abs();
    const double rounding = static_cast<double>(pivots.numel()) *
        std::numeric_limits<double>::epsilon();
    return (pivots.amin() <= rounding * pivots.amax()).item<bool>();
  }

 private:
  at::Tensor lu_;
  at::Tensor pivots_;
};

} // namespace memcnn::detail
