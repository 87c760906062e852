// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/dense.h>
#include <memcnn/detail/describe.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace memcnn::detail {

/// How many binary digits a floating point dtype holds exactly.
inline int64_t digits_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 53;
    case at::kFloat:
      return 24;
    case at::kHalf:
      return 11;
    case at::kBFloat16:
      return 8;
    default:
      return 0;
  }
}

/// Multiples of 2^-k, which floating point numbers add and subtract without
/// rounding as long as they stay below 2^(digits - k) (Note [Exact mode]).
class FixedPoint {
 public:
  explicit FixedPoint(int64_t fractional_bits)
      : fractional_bits_(fractional_bits) {}

  /// The nearest multiples, as a dense tensor. Rounding passes the gradient
  /// straight through, in the same memory format: the kernels of forward,
  /// recomputation and backward are then the same ones on every path.
  at::Tensor round(const at::Tensor& tensor) const {
    return at::GradMode::is_enabled() && tensor.requires_grad()
        ? StraightThrough::apply(DenseGradient::apply(tensor), fractional_bits_)
        : rounded(tensor, fractional_bits_);
  }

  /// Stops where values have left the range in which sums are exact. `place`
  /// begins the message.
  void check_range(const std::string& place, const at::Tensor& tensor) const {
    const int64_t digits = digits_of(tensor.scalar_type());
    TORCH_CHECK_VALUE(
        fractional_bits_ < digits,
        place,
        "expected fractional_bits below ",
        digits,
        ", the digits of ",
        tensor.scalar_type(),
        ", but got ",
        fractional_bits_,
        ". Set fewer fractional_bits, or convert the input with to().");
    if (tensor.numel() == 0) {
      return;
    }
    const double limit =
        std::ldexp(1.0, static_cast<int>(digits - fractional_bits_));
    const auto [low, high] = at::aminmax(tensor.detach());
    const double largest = std::max(-low.item<double>(), high.item<double>());
    // NaN compares false with everything: it is no overflow of the range, and
    // spreads as without the exact mode.
    TORCH_CHECK_VALUE(
        !(largest >= limit),
        place,
        "expected values below 2^",
        digits - fractional_bits_,
        " = ",
        limit,
        ", where fractional_bits(",
        fractional_bits_,
        ") is exact in ",
        tensor.scalar_type(),
        ", but got ",
        largest,
        " (",
        describe(tensor),
        "). Set fewer fractional_bits, or normalise the values.");
  }

 private:
  struct StraightThrough : torch::autograd::Function<StraightThrough> {
    static at::Tensor forward(
        torch::autograd::AutogradContext*,
        const at::Tensor& tensor,
        int64_t bits) {
      return rounded(tensor, bits);
    }
    static torch::autograd::variable_list backward(
        torch::autograd::AutogradContext*,
        const torch::autograd::variable_list& gradients) {
      return {gradients[0], at::Tensor()};
    }
  };

  static at::Tensor rounded(const at::Tensor& tensor, int64_t bits) {
    const double scale = std::ldexp(1.0, static_cast<int>(bits));
    // Scaling by a power of two is exact.
    return dense(tensor.mul(scale).round_().mul_(1.0 / scale));
  }

  int64_t fractional_bits_;
};

} // namespace memcnn::detail
