// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/options.h>
#include <memcnn/detail/branch.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/halves.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/log_det_asked.h>
#include <memcnn/detail/log_det_sum.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/slice.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <ostream>
#include <utility>
#include <vector>

namespace memcnn {

/// What a branch of an affine coupling returns: y = scale * x + shift.
///
/// Shapes:   all as the half that they act on.
struct ScaleShift {
  at::Tensor scale;
  at::Tensor shift;
  /// The logarithm of |scale|, for log-determinants. May be left out: then that
  /// of scale is taken, which is lost where a small scale rounds to 0.
  at::Tensor log_scale = {};

  /// What the debug mode compares. The logarithm is known by its scale.
  friend std::vector<at::Tensor> tensors_in(const ScaleShift& value) {
    return {value.scale, value.shift};
  }
};

namespace detail {

/// The parts of h = f(x), which has twice the channels: even channels are the
/// shift, odd ones the raw scale.
inline ScaleShift split_scale_shift(
    const char* adapter,
    const at::Tensor& input,
    const at::Tensor& h,
    int64_t dim) {
  TORCH_CHECK_VALUE(
      h.dim() == input.dim() && h.size(dim) % 2 == 0,
      adapter,
      "::forward(): expected f to return an even size in dim ",
      dim,
      " (the scale and the shift of each channel), but got ",
      describe(h),
      " (input ",
      describe(input),
      "). Let f return twice as many channels as the other half has.");
  const int64_t end = h.size(dim);
  return {
      at::slice(h, dim, /*start=*/1, end, /*step=*/2),
      at::slice(h, dim, /*start=*/0, end, /*step=*/2)};
}

/// A raw scale in the dtype of log-determinants: autocast may have narrowed it.
inline at::Tensor wide(const at::Tensor& raw) {
  return raw.to(LogDetSum::dtype_for(raw));
}

/// s = sigmoid(raw + 2).
struct SigmoidRule {
  static constexpr const char* kName = "AffineAdapterSigmoid";
  using Options = CouplingOptions;

  SigmoidRule() = default;
  explicit SigmoidRule(const Options& /*options*/) {}

  ScaleShift apply(const at::Tensor& input, const at::Tensor& h, int64_t dim)
      const {
    auto [raw, shift, none] = split_scale_shift(kName, input, h, dim);
    // By itself: where a sigmoid rounds to 0 its logarithm is lost.
    return {
        at::sigmoid(raw + 2),
        std::move(shift),
        LogDetAsked::here() ? at::log_sigmoid(wide(raw) + 2) : none};
  }

  void print(std::ostream& /*stream*/) const {}
};

/// t = f(x) is the shift and exp(t) the scale.
struct NaiveRule {
  static constexpr const char* kName = "AffineAdapterNaive";
  using Options = CouplingOptions;

  NaiveRule() = default;
  explicit NaiveRule(const Options& /*options*/) {}

  ScaleShift apply(
      const at::Tensor& /*input*/,
      const at::Tensor& h,
      int64_t /*dim*/) const {
    return {at::exp(h), h, LogDetAsked::here() ? h : at::Tensor()};
  }

  void print(std::ostream& /*stream*/) const {}
};

/// The module behind the adapters: a rule on top of an injected f. Beside its
/// input it takes the conditions that f takes.
template <class F, class Rule, class Conditions = UsualConditions<F>>
class AffineAdapterImpl;

template <class F, class Rule, size_t... I>
class AffineAdapterImpl<F, Rule, std::index_sequence<I...>> final
    : public torch::nn::Cloneable<AffineAdapterImpl<F, Rule>>,
      public SplitsChannels {
  static_assert(
      is_holder_v<F>,
      "memcnn: an affine adapter takes a module holder (as TORCH_MODULE makes "
      "it), a torch::nn::Sequential or a torch::nn::AnyModule.");

 public:
  /// Its split_dim is that of the coupling around it, and 1 without one.
  explicit AffineAdapterImpl(F f_) : f(std::move(f_)) {
    reset();
  }

  AffineAdapterImpl(F f_, const typename Rule::Options& options)
      : f(std::move(f_)), rule_(options), split_dim_(options.split_dim()) {
    reset();
  }

  void reset() override {
    this->register_module("f", f.ptr());
  }

  ScaleShift forward(const at::Tensor& input, TensorAt<I>... conditions) {
    check_twin(input);
    const at::Tensor arguments[] = {input, conditions...};
    return rule_.apply(
        input, call_branch<at::Tensor>(f, arguments), split_dim());
  }

  int64_t split_dim() const override {
    return split_dim_.value_or(CouplingOptions().split_dim());
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<AffineAdapterImpl>(detail::clone(f, device));
    copy->rule_ = rule_;
    copy->split_dim_ = split_dim_;
    copy->twin_ = twin_;
    copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::" << Rule::kName << "(split_dim=" << split_dim();
    rule_.print(stream);
    stream << ")";
  }

  F f;

 private:
  bool take_split_dim(int64_t dim) override {
    if (!split_dim_) {
      split_dim_ = dim;
    }
    if (dim == *split_dim_) {
      return true;
    }
    if ((dim < 0) == (*split_dim_ < 0) || twin_.value_or(dim) != dim) {
      return false;
    }
    twin_ = dim;
    return true;
  }

  void check_twin(const at::Tensor& input) const {
    TORCH_CHECK_VALUE(
        !twin_ || std::abs(*twin_ - split_dim()) == input.dim(),
        Rule::kName,
        "::forward(): expected split_dim ",
        split_dim(),
        " to be the coupling's ",
        twin_.value_or(0),
        ", but got an input of ",
        describe(input),
        ". Leave the adapter's CouplingOptions out: it takes its coupling's.");
  }

  Rule rule_;
  std::optional<int64_t> split_dim_; // none before a coupling gives its own
  std::optional<int64_t> twin_; // split_dim, counted from the other end
};

} // namespace detail

/// Options of AffineAdapterTanh; what they say is fixed once the module is
/// constructed.
struct AffineAdapterTanhOptions {
  /// The largest |log scale|: above 0. Default: 2, scales from 0.14 to 7.4.
  TORCH_ARG(double, bound) = 2;
  /// As in CouplingOptions. Default: that of the coupling around it.
  TORCH_ARG(std::optional<int64_t>, split_dim) = std::nullopt;
};

namespace detail {

/// s = exp(r), r = bound * tanh(raw / bound).
struct TanhRule {
  static constexpr const char* kName = "AffineAdapterTanh";
  using Options = AffineAdapterTanhOptions;

  TanhRule() = default;
  explicit TanhRule(const Options& options) : bound(options.bound()) {
    TORCH_CHECK_VALUE(
        std::isfinite(bound) && bound > 0,
        kName,
        "::",
        kName,
        "(): expected a bound above 0, but got ",
        bound,
        ". It bounds |log scale|; 2 suits most flows.");
  }

  ScaleShift apply(const at::Tensor& input, const at::Tensor& h, int64_t dim)
      const {
    auto [raw, shift, none] = split_scale_shift(kName, input, h, dim);
    const at::Tensor log_scale = at::tanh(wide(raw) / bound) * bound;
    return {
        at::exp(log_scale).to(raw.scalar_type()),
        std::move(shift),
        LogDetAsked::here() ? log_scale : none};
  }

  void print(std::ostream& stream) const {
    stream << ", bound=" << bound;
  }

  double bound = Options().bound();
};

} // namespace detail

template <class F>
using AffineAdapterNaiveImpl = detail::AffineAdapterImpl<F, detail::NaiveRule>;

template <class F>
using AffineAdapterSigmoidImpl =
    detail::AffineAdapterImpl<F, detail::SigmoidRule>;

template <class F>
using AffineAdapterTanhImpl = detail::AffineAdapterImpl<F, detail::TanhRule>;

/// Turns f into a branch of an affine coupling: f(x) is the shift, exp(f(x))
/// the scale.
///
/// \f[ t = f(x), \quad s = \exp(t) \f]
///
/// Shapes:   x (N, C, *); f returns what the other half looks like.
/// Avoid if: f(x) can grow: exp overflows float32 at 89 and vanishes at -104,
///           and a vanished scale has no inverse. Prefer AffineAdapterSigmoid.
/// Source:   Python MemCNN 1.5.2, AffineAdapterNaive. Differs: no.
/// Example:
///   memcnn::AffineCoupling affine{memcnn::AffineAdapterNaive{f},
///                                 memcnn::AffineAdapterNaive{g}};
template <class F>
class AffineAdapterNaive
    : public torch::nn::ModuleHolder<AffineAdapterNaiveImpl<F>> {
 public:
  using torch::nn::ModuleHolder<AffineAdapterNaiveImpl<F>>::ModuleHolder;
  using Impl = AffineAdapterNaiveImpl<F>;
};
template <class F>
AffineAdapterNaive(F, CouplingOptions = {}) -> AffineAdapterNaive<F>;

/// Turns f, which returns twice the channels, into a branch of an affine
/// coupling whose scale lies between 0 and 1.
///
/// \f[ h = f(x), \quad s = \sigma(h_{1::2} + 2), \quad t = h_{0::2} \f]
///
/// Shapes:   x (N, C, *); f(x) (N, 2 C', *), C' the channels of the other half;
///           "channels" are those along the coupling's split_dim.
/// Throws:   c10::ValueError if f returns an odd size in split_dim.
/// Source:   Kingma and Dhariwal 2018, Glow, arXiv:1807.03039, in the form of
///           Python MemCNN 1.5.2. Differs: MemCNN always takes dim 1 apart.
/// Example:
///   memcnn::AffineCoupling affine{memcnn::AffineAdapterSigmoid{f},
///                                 memcnn::AffineAdapterSigmoid{g}};
template <class F>
class AffineAdapterSigmoid
    : public torch::nn::ModuleHolder<AffineAdapterSigmoidImpl<F>> {
 public:
  using torch::nn::ModuleHolder<AffineAdapterSigmoidImpl<F>>::ModuleHolder;
  using Impl = AffineAdapterSigmoidImpl<F>;
};
template <class F>
AffineAdapterSigmoid(F, CouplingOptions = {}) -> AffineAdapterSigmoid<F>;

/// Turns f, which returns twice the channels, into a branch of an affine
/// coupling whose scale can neither vanish nor grow: its logarithm is bounded,
/// alike to both sides.
///
/// \f[ h = f(x), \quad \log s = b \tanh(h_{1::2} / b), \quad t = h_{0::2} \f]
///
/// Shapes:   as AffineAdapterSigmoid.
/// Throws:   c10::ValueError if f returns an odd size in split_dim, or the bound
///           b is not above 0.
/// Source:   Dinh et al. 2017, Density estimation using Real NVP,
///           arXiv:1605.08803, section 3.7, where the bound is learned.
/// Example:
///   memcnn::AffineCoupling affine(
///       memcnn::AffineAdapterTanh(
///           f, memcnn::AffineAdapterTanhOptions().bound(1.5)),
///       memcnn::Unchanged());
template <class F>
class AffineAdapterTanh
    : public torch::nn::ModuleHolder<AffineAdapterTanhImpl<F>> {
 public:
  using torch::nn::ModuleHolder<AffineAdapterTanhImpl<F>>::ModuleHolder;
  using Impl = AffineAdapterTanhImpl<F>;
};
template <class F>
AffineAdapterTanh(F, AffineAdapterTanhOptions = {}) -> AffineAdapterTanh<F>;

} // namespace memcnn
