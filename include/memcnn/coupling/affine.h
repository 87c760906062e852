// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/options.h>
#include <memcnn/detail/coupling.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// y = s * x + t, undone by x = (y - t) / s.
struct AffineLaw {
  static constexpr const char* kName = "AffineCoupling";
  static constexpr bool kCanBeExact = false;
  static constexpr LogDet kLogDet = LogDet::kSample;
  static constexpr size_t kApplied = 2; // not log_scale
  using Value = ScaleShift;

  static std::vector<at::Tensor> tensors(const Value& value) {
    std::vector<at::Tensor> parts = {value.scale, value.shift};
    if (value.log_scale.defined()) {
      parts.push_back(value.log_scale);
    }
    return parts;
  }

  template <class Fn>
  static Value map(const Value& value, Fn&& fn) {
    return {
        fn(value.scale),
        fn(value.shift),
        value.log_scale.defined() ? fn(value.log_scale) : at::Tensor()};
  }

  static at::Tensor log_slope(const Value& value) {
    const at::Tensor& given =
        value.log_scale.defined() ? value.log_scale : value.scale;
    const at::Tensor wide = given.to(LogDetSum::dtype_for(given));
    return value.log_scale.defined() ? wide : wide.abs().log();
  }

  static at::Tensor
  apply(Direction direction, const at::Tensor& half, const Value& value) {
    if (direction == Direction::kForward) {
      return half * value.scale + value.shift;
    }
    check_scale(value);
    return (half - value.shift) / value.scale;
  }

  static void apply_in_place(
      Direction direction,
      const at::Tensor& half,
      const Value& value) {
    if (direction == Direction::kForward) {
      half.mul_(value.scale).add_(value.shift);
    } else {
      check_scale(value);
      half.sub_(value.shift).div_(value.scale);
    }
  }

  /// grad is that of the updated half, and becomes that of the half before;
  /// grad_log_det, (N), is undefined where none arrived.
  static std::vector<at::Tensor> pull_back(
      Direction direction,
      const at::Tensor& x,
      const Value& value,
      at::Tensor& grad,
      const at::Tensor& grad_log_det) {
    std::vector<at::Tensor> grads = direction == Direction::kForward
        ? pull_back_forward(x, value, grad)
        : pull_back_inverse(x, value, grad);
    // The log-determinant is the sum of log |s|, or the negative of it.
    const int sign = direction == Direction::kForward ? 1 : -1;
    if (value.log_scale.defined()) {
      grads.push_back(
          grad_log_det.defined()
              ? (sign * for_each_entry(grad_log_det, value.log_scale))
                    .to(value.log_scale.scalar_type())
                    .expand_as(value.log_scale)
              : at::Tensor());
    } else if (grad_log_det.defined()) {
      grads[0].add_(
          for_each_entry(grad_log_det, value.scale) / value.scale, sign);
    }
    return grads;
  }

 private:
  static std::vector<at::Tensor> pull_back_forward(
      const at::Tensor& x,
      const Value& value,
      at::Tensor& grad) { // y = s x + t
    at::Tensor shift = grad.clone();
    at::Tensor scale = grad * x;
    grad.mul_(value.scale);
    return {std::move(scale), std::move(shift)};
  }

  static std::vector<at::Tensor> pull_back_inverse(
      const at::Tensor& x,
      const Value& value,
      at::Tensor& grad) { // x = (y - t) / s
    grad.div_(value.scale);
    at::Tensor shift = -grad;
    return {shift * x, shift};
  }

  /// A number for each sample, (N), as one that goes with each of its entries.
  static at::Tensor for_each_entry(
      const at::Tensor& numbers,
      const at::Tensor& entries) {
    std::vector<int64_t> sizes(static_cast<size_t>(entries.dim()), 1);
    sizes[0] = -1;
    return numbers.view(sizes);
  }

  /// Checked where it costs no wait for a device; elsewhere a zero scale shows
  /// as NaN.
  static void check_scale(const Value& value) {
    if (value.scale.is_cpu()) {
      TORCH_CHECK_VALUE(
          value.scale.ne(0).all().item<bool>(),
          kName,
          "::inverse(): expected a scale without zeros, but got one with ",
          value.scale.eq(0).sum().item<int64_t>(),
          " (scale ",
          describe(value.scale),
          "). Bound the scale away from zero, as AffineAdapterSigmoid does.");
    }
  }
};

} // namespace detail

template <class F, class G>
using AffineCouplingImpl =
    typename detail::coupling_of<F, G, detail::AffineLaw>::type;

/// Scales and shifts one half of the input by what F says of the other half,
/// then that one by what G says of the result.
///
/// \f[ (s, t) = F(x_2), \; y_1 = s x_1 + t, \quad
///     (s', t') = G(y_1), \; y_2 = s' x_2 + t' \f]
/// \f[ x_2 = (y_2 - t') / s', \quad x_1 = (y_1 - t) / s \f]
///
/// Shapes:   input, output (N, C, *) or any other with at least 2 entries in
///           split_dim; F and G return a ScaleShift, of the sizes of the half
///           that they act on, as AffineAdapterNaive and AffineAdapterSigmoid
///           do.
/// Dtypes:   floating point; F and G may return a narrower dtype (autocast).
/// Log-det:  sum of log |s| and log |s'| over a sample.
/// Memory:   as AdditiveCoupling.
/// Accuracy: as AdditiveCoupling for a round trip of one coupling; each inverse
///           divides by the scale, so that rounding grows with depth.
/// Throws:   as AdditiveCoupling, and c10::ValueError if the inverse meets a
///           scale of zero (on the CPU; elsewhere the result is NaN), or if an
///           adapter's split_dim differs from the coupling's.
/// Source:   Dinh et al. 2017, Density estimation using Real NVP, equation 4,
///           arXiv:1605.08803. Differs from Python MemCNN: the fused step.
/// Example:
///   memcnn::AffineCoupling affine(memcnn::AffineAdapterSigmoid(Wide(32)),
///                                 memcnn::AffineAdapterSigmoid(Wide(32)));
template <class F, class G = F>
class AffineCoupling
    : public torch::nn::ModuleHolder<AffineCouplingImpl<F, G>> {
 public:
  using torch::nn::ModuleHolder<AffineCouplingImpl<F, G>>::ModuleHolder;
  using Impl = AffineCouplingImpl<F, G>;
};
template <class F, class G>
AffineCoupling(F, G, CouplingOptions = {}) -> AffineCoupling<F, G>;
template <class F>
AffineCoupling(F, CouplingOptions = {}) -> AffineCoupling<F, F>;

} // namespace memcnn
