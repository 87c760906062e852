// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/options.h>
#include <memcnn/detail/coupling.h>
#include <memcnn/detail/describe.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/pimpl.h>

#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// y = s * x + t, undone by x = (y - t) / s.
struct AffineLaw {
  static constexpr const char* kName = "AffineCoupling";
  static constexpr bool kCanBeExact = false;
  using Value = ScaleShift;

  static std::vector<at::Tensor> tensors(const Value& value) {
    return {value.scale, value.shift};
  }

  template <class Fn>
  static Value map(const Value& value, Fn&& fn) {
    return {fn(value.scale), fn(value.shift)};
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

  /// grad is that of the updated half, and becomes that of the half before.
  static std::vector<at::Tensor> pull_back(
      Direction direction,
      const at::Tensor& x,
      const Value& value,
      at::Tensor& grad) {
    if (direction == Direction::kForward) { // y = s x + t
      at::Tensor shift = grad.clone();
      at::Tensor scale = grad * x;
      grad.mul_(value.scale);
      return {std::move(scale), std::move(shift)};
    }
    grad.div_(value.scale); // x = (y - t) / s
    at::Tensor shift = -grad;
    return {shift * x, shift};
  }

 private:
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
