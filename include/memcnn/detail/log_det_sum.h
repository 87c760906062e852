// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <utility>

namespace memcnn::detail {

/// The sum of the log-determinants of all that one run does: one number for each
/// sample, in one buffer, whatever the depth.
///
/// Shapes:   (N), of the dimension 0 of what runs.
/// Dtypes:   float64 of a float64 stream, else float32.
class LogDetSum {
 public:
  /// Of the samples in `stream`, the input of the run.
  explicit LogDetSum(const at::Tensor& stream) {
    TORCH_CHECK_VALUE(
        stream.defined() && stream.dim() > 0,
        "memcnn: expected an input with a dim 0, the samples, for a "
        "log-determinant of each, but got ",
        describe(stream),
        ". Add the dimension with unsqueeze(0).");
    samples_ = stream.size(0);
    options_ = stream.options().requires_grad(false).dtype(dtype_for(stream));
  }

  /// The dtype of log-determinants of what is computed in the stream's.
  static at::ScalarType dtype_for(const at::Tensor& stream) {
    return stream.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }

  /// Adds log-determinants, (N), or that of all samples alike, (); `sign` is 1,
  /// or -1 where they are those of the opposite map. In place unless a graph is
  /// built.
  void add(const at::Tensor& log_det, int sign = 1) {
    const at::Tensor addend = log_det.scalar_type() == options_.dtype()
        ? log_det
        : log_det.to(options_);
    make();
    if (at::GradMode::is_enabled() &&
        (sum_.requires_grad() || addend.requires_grad())) {
      sum_ = at::add(sum_, addend, sign);
    } else {
      sum_.add_(addend, sign);
    }
  }

  /// The sum until now.
  const at::Tensor& so_far() {
    make();
    return sum_;
  }

  /// The sum, given away; zeros where nothing was added.
  at::Tensor take() {
    make();
    return std::move(sum_);
  }

 private:
  void make() {
    if (!sum_.defined()) {
      sum_ = at::zeros({samples_}, options_);
    }
  }

  int64_t samples_ = 0;
  at::TensorOptions options_;
  at::Tensor sum_;
};

} // namespace memcnn::detail
