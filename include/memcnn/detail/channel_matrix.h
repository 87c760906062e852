// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/lu_factors.h>
#include <memcnn/detail/orthogonal_matrix.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <tuple>

namespace memcnn::detail {

/// What a run asks of a matrix beside itself.
struct MatrixWants {
  bool inverse = false;
  bool log_abs_det = false;
};

/// A square matrix for one run. What was not asked for is undefined.
struct MatrixValues {
  at::Tensor exact; // with the graph of the parameters, in their precision
  at::Tensor weight; // the same in the stream's dtype
  at::Tensor inverse; // of that weight, in that dtype
  at::Tensor log_abs_det; // (), float64; undefined where it is always 0
};

/// The factors of a weight whose inverse or log-determinant is needed by a method
/// of Conv1x1. On the CPU it has to be invertible; elsewhere a look would wait for
/// the device, and the results say so themselves, -inf and NaN.
inline LuFactors factors_of(const char* method, const at::Tensor& weight) {
  LuFactors factors(weight);
  TORCH_CHECK_VALUE(
      !weight.is_cpu() || !factors.is_singular(),
      "Conv1x1::",
      method,
      "(): expected an invertible weight, but got a singular one (sizes ",
      weight.sizes(),
      "). Give it another by set_weight(), or the parametrization kLU or "
      "kOrthogonal, which stay invertible.");
  return factors;
}

/// Interface: how a square matrix is kept as parameters of a module.
class ChannelMatrix {
 public:
  virtual ~ChannelMatrix() = default;

  /// The matrix, with the graph of its parameters.
  virtual at::Tensor exact() const = 0;

  /// Sets the parameters to those of another one, which has been checked for its
  /// sizes.
  virtual void set(const at::Tensor& weight) = 0;

  /// What a run needs, of a stream of this dtype. `method` is named in errors.
  MatrixValues
  values(at::ScalarType dtype, MatrixWants wants, const char* method) const {
    MatrixValues found;
    found.exact = exact();
    found.weight = found.exact.to(dtype);
    add(found, wants, method);
    return found;
  }

 private:
  /// Adds what follows from the weight.
  virtual void add(MatrixValues& values, MatrixWants wants, const char* method)
      const = 0;
};

/// The matrix itself is the parameter, `weight`: it may become singular.
class PlainMatrix final : public ChannelMatrix {
 public:
  PlainMatrix(torch::nn::Module& module, const at::Tensor& start)
      : weight_(module.register_parameter(
            "weight",
            start.to(c10::get_default_dtype_as_scalartype()))) {}

  at::Tensor exact() const override {
    return weight_;
  }

  void set(const at::Tensor& weight) override {
    const at::NoGradGuard no_grad;
    weight_.copy_(weight);
  }

 private:
  void add(MatrixValues& values, MatrixWants wants, const char* method)
      const override {
    if (!wants.inverse && !wants.log_abs_det) {
      return;
    }
    const LuFactors factors = factors_of(method, values.weight);
    if (wants.inverse) {
      values.inverse = factors.inverse().to(values.weight.scalar_type());
    }
    if (wants.log_abs_det) {
      values.log_abs_det = values.weight.is_same(values.exact)
          ? factors.log_abs_det()
          : LuFactors(values.exact).log_abs_det();
    }
  }

  at::Tensor weight_;
};

/// P L (U + D), D = diag(sign * exp(log_scale)): the determinant is that of D, so
/// that it is never 0, and its logarithm a sum. `factors` holds L below the
/// diagonal and U above it; its diagonal does not count. P and the signs stay as
/// they are: buffers. P is kept as a matrix of zeros and ones, which no dtype
/// rounds.
class LuMatrix final : public ChannelMatrix {
 public:
  LuMatrix(torch::nn::Module& module, const at::Tensor& start) {
    const auto dtype =
        at::TensorOptions(c10::get_default_dtype_as_scalartype());
    const int64_t n = start.size(0);
    factors_ = module.register_parameter("factors", at::empty({n, n}, dtype));
    log_scale_ = module.register_parameter("log_scale", at::empty({n}, dtype));
    permutation_ =
        module.register_buffer("permutation", at::empty({n, n}, dtype));
    sign_ = module.register_buffer("sign", at::empty({n}, dtype));
    set(start);
  }

  at::Tensor exact() const override {
    const at::Tensor factors = factors_.to(at::kDouble);
    const at::Tensor scale =
        sign_.to(at::kDouble) * log_scale_.to(at::kDouble).exp();
    const at::Tensor lower = factors.tril(-1) +
        at::eye(factors.size(0), factors.options().requires_grad(false));
    const at::Tensor upper = factors.triu(1) + scale.diag();
    return permutation_.to(at::kDouble).matmul(lower.matmul(upper));
  }

  void set(const at::Tensor& weight) override {
    const at::NoGradGuard no_grad;
    const at::Tensor wide = weight.to(at::kDouble);
    factors_of("set_weight", wide);
    const auto [permutation, lower, upper] = at::linalg_lu(wide);
    factors_.copy_(lower.tril(-1) + upper.triu(1));
    log_scale_.copy_(upper.diagonal().abs().log());
    permutation_.copy_(permutation);
    sign_.copy_(upper.diagonal().sign());
  }

 private:
  void add(MatrixValues& values, MatrixWants wants, const char* method)
      const override {
    if (wants.inverse) {
      values.inverse = factors_of(method, values.weight)
                           .inverse()
                           .to(values.weight.scalar_type());
    }
    if (wants.log_abs_det) {
      values.log_abs_det = log_scale_.to(at::kDouble).sum();
    }
  }

  at::Tensor factors_;
  at::Tensor log_scale_;
  at::Tensor permutation_;
  at::Tensor sign_;
};

/// A rotation or reflection: the inverse is the transpose, the log-determinant 0.
class OrthogonalChannelMatrix final : public ChannelMatrix {
 public:
  OrthogonalChannelMatrix(torch::nn::Module& module, const at::Tensor& start)
      : matrix_(module, start) {}

  at::Tensor exact() const override {
    return matrix_.value();
  }

  void set(const at::Tensor& weight) override {
    const at::NoGradGuard no_grad;
    const at::Tensor wide = weight.to(at::kDouble);
    const at::Tensor identity = at::eye(wide.size(0), wide.options());
    const auto error =
        at::amax((wide.matmul(wide.t()) - identity).abs()).item<double>();
    TORCH_CHECK_VALUE(
        error <= kTolerance,
        "Conv1x1::set_weight(): expected an orthogonal weight, W W^T = I "
        "within ",
        kTolerance,
        ", but got one that is off by ",
        error,
        " (sizes ",
        weight.sizes(),
        "). Use the parametrization kPlain or kLU for other matrices.");
    const auto [left, values, right] = at::linalg_svd(wide);
    matrix_.set(left.matmul(right)); // the nearest that is orthogonal
  }

 private:
  static constexpr double kTolerance = 1e-4;

  void add(MatrixValues& values, MatrixWants wants, const char* /*method*/)
      const override {
    if (wants.inverse) {
      values.inverse = values.weight.t();
    }
  }

  OrthogonalMatrix matrix_;
};

} // namespace memcnn::detail
