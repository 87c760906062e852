// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/options.h>
#include <memcnn/detail/coupling.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <vector>

namespace memcnn {
namespace detail {

/// y = x + v, undone by x = y - v.
struct AdditiveLaw {
  static constexpr const char* kName = "AdditiveCoupling";
  static constexpr bool kCanBeExact = true;
  static constexpr LogDet kLogDet = LogDet::kZero;
  static constexpr size_t kApplied = 1;
  using Value = at::Tensor;

  static std::vector<at::Tensor> tensors(const Value& value) {
    return {value};
  }

  template <class Fn>
  static Value map(const Value& value, Fn&& fn) {
    return fn(value);
  }

  static at::Tensor
  apply(Direction direction, const at::Tensor& half, const Value& value) {
    return direction == Direction::kForward ? half + value : half - value;
  }

  static void apply_in_place(
      Direction direction,
      const at::Tensor& half,
      const Value& value) {
    direction == Direction::kForward ? half.add_(value) : half.sub_(value);
  }

  /// The half before has the gradient of the updated one: grad stays.
  static std::vector<at::Tensor> pull_back(
      Direction direction,
      const at::Tensor& /*x*/,
      const Value& /*value*/,
      at::Tensor& grad,
      const at::Tensor& /*grad_log_det*/) {
    return {direction == Direction::kForward ? grad : -grad};
  }
};

} // namespace detail

template <class F, class G>
using AdditiveCouplingImpl =
    typename detail::coupling_of<F, G, detail::AdditiveLaw>::type;

/// Adds F of one half of the input to the other half, then G of the result
/// back.
///
/// \f[ y_1 = x_1 + F(x_2), \quad y_2 = x_2 + G(y_1) \f]
/// \f[ x_2 = y_2 - G(y_1), \quad x_1 = y_1 - F(x_2) \f]
///
/// Shapes:   input, output (N, C, *) or any other with at least 2 entries in
///           split_dim; F and G map one half to the sizes of the other. An odd
///           C is split as torch::chunk does, the first half the larger.
/// Dtypes:   floating point; F and G may return a narrower dtype (autocast).
/// Log-det:  0 for every sample.
/// Memory:   in a wrapper or sequence, numel(output) * itemsize bytes at most
///           are kept for backward; by itself a coupling is a plain module.
/// Accuracy: a round trip is off by 1e-14 in float64, 2e-6 in float32 (tested).
/// Throws:   c10::ValueError if F or G returns other sizes than the half has,
///           or split_dim does not fit; c10::TypeError for integer tensors or a
///           wider dtype from F or G.
/// Source:   Gomez et al. 2017, The Reversible Residual Network, equation 6,
///           arXiv:1707.04585; Dinh et al. 2014, NICE, arXiv:1410.8516. Differs
///           from Python MemCNN: the fused step, an exact mode.
/// Example:
///   memcnn::AdditiveCoupling coupling(Branch(32), Branch(32));
///   memcnn::AdditiveCoupling copied(Branch(32)); // G is a deep copy of F
///   torch::Tensor y = coupling(x);
///
/// To read next: invertible.h, which says what a backward step is.
template <class F, class G = F>
class AdditiveCoupling
    : public torch::nn::ModuleHolder<AdditiveCouplingImpl<F, G>> {
 public:
  using torch::nn::ModuleHolder<AdditiveCouplingImpl<F, G>>::ModuleHolder;
  using Impl = AdditiveCouplingImpl<F, G>;
};
template <class F, class G>
AdditiveCoupling(F, G, CouplingOptions = {}) -> AdditiveCoupling<F, G>;
template <class F>
AdditiveCoupling(F, CouplingOptions = {}) -> AdditiveCoupling<F, F>;

} // namespace memcnn
