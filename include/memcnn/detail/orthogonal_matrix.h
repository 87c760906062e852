// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace memcnn::detail {

/// A random rotation of n dimensions, all equally likely, in float64.
inline at::Tensor random_rotation(int64_t n) {
  const at::Tensor normal = at::randn({n, n}, at::kDouble);
  const auto [q, r] = at::linalg_qr(normal);
  // Q is unique, and so independent of the routine, once R's diagonal is
  // positive; one column more turns a reflection into a rotation.
  at::Tensor rotation = q * r.diagonal().sign();
  rotation.select(1, 0).mul_(at::linalg_det(rotation).sign());
  return rotation.contiguous(); // QR goes by columns
}

/// The orthogonal matrix next to each of some matrices, (*, n, n), that are
/// orthogonal but for rounding: each step squares the error, of 4e-3 in bfloat16,
/// 1e-7 in float32.
inline at::Tensor orthogonal_next_to(at::Tensor matrix) {
  constexpr int kSteps = 2;
  for (int step = 0; step < kSteps; ++step) {
    matrix = 1.5 * matrix - 0.5 * matrix.matmul(matrix.mT().matmul(matrix));
  }
  return matrix;
}

/// Orthogonal matrices, (*, n, n), as parameters that any step of an optimiser
/// leaves orthogonal.
///
/// \f[ Q = Q_0 (I - S/2)^{-1} (I + S/2), \quad S = A - A^T \f]
///
/// A, of which what lies below the diagonal counts, is the parameter `skew`, and
/// 0 at the start; Q_0 the buffer `base`. The second factor, Cayley's, reaches
/// every rotation without an eigenvalue of -1, so that alone it would miss the
/// matrix of Haar's wavelet; Q_0 brings the start within reach, wherever it is.
class OrthogonalMatrix {
 public:
  /// Registers both in a module.
  OrthogonalMatrix(torch::nn::Module& module, const at::Tensor& start) {
    const at::Tensor base = start.to(c10::get_default_dtype_as_scalartype());
    base_ = module.register_buffer(
        "base", base.clone(at::MemoryFormat::Contiguous));
    skew_ = module.register_parameter("skew", at::zeros_like(base_));
  }

  /// From now on Q is this one.
  void set(const at::Tensor& orthogonal) {
    const at::NoGradGuard no_grad;
    base_.copy_(orthogonal);
    skew_.zero_();
  }

  /// Q, in float64: rounding to the parameters' dtype would show in Q^T Q.
  at::Tensor value() const {
    const at::Tensor lower = skew_.to(at::kDouble).tril(-1);
    const at::Tensor half = (lower - lower.mT()) / 2;
    const at::Tensor identity = at::eye(half.size(-1), half.options());
    // Never singular: the eigenvalues of S are imaginary.
    const at::Tensor cayley =
        std::get<0>(at::linalg_solve_ex(identity - half, identity + half));
    return orthogonal_next_to(base_.to(at::kDouble)).matmul(cayley);
  }

 private:
  at::Tensor base_;
  at::Tensor skew_;
};

} // namespace memcnn::detail
