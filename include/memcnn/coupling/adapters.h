// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/coupling/options.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/halves.h>
#include <memcnn/detail/holder.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/slice.h>
#include <c10/util/Exception.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

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
/// Shapes:   both as the half that they act on.
struct ScaleShift {
  at::Tensor scale;
  at::Tensor shift;

  /// What the debug mode compares.
  friend std::vector<at::Tensor> tensors_in(const ScaleShift& value) {
    return {value.scale, value.shift};
  }
};

namespace detail {

/// h = f(x) with twice the channels: even channels are the shift, odd ones the
/// raw scale.
struct SigmoidRule {
  static constexpr const char* kName = "AffineAdapterSigmoid";

  static ScaleShift
  apply(const at::Tensor& input, const at::Tensor& h, int64_t dim) {
    TORCH_CHECK_VALUE(
        h.dim() == input.dim() && h.size(dim) % 2 == 0,
        kName,
        "::forward(): expected f to return an even size in dim ",
        dim,
        " (the scale and the shift of each channel), but got ",
        describe(h),
        " (input ",
        describe(input),
        "). Let f return twice as many channels as the other half has.");
    const int64_t end = h.size(dim);
    at::Tensor raw_scale = at::slice(h, dim, /*start=*/1, end, /*step=*/2);
    at::Tensor shift = at::slice(h, dim, /*start=*/0, end, /*step=*/2);
    return {at::sigmoid(raw_scale + 2), std::move(shift)};
  }
};

/// t = f(x) is the shift and exp(t) the scale.
struct NaiveRule {
  static constexpr const char* kName = "AffineAdapterNaive";

  static ScaleShift
  apply(const at::Tensor& /*input*/, const at::Tensor& h, int64_t /*dim*/) {
    return {at::exp(h), h};
  }
};

/// The module behind both adapters: a rule on top of an injected f.
template <class F, class Rule>
class AffineAdapterImpl final
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

  AffineAdapterImpl(F f_, const CouplingOptions& options)
      : f(std::move(f_)), split_dim_(options.split_dim()) {
    reset();
  }

  void reset() override {
    this->register_module("f", f.ptr());
  }

  ScaleShift forward(const at::Tensor& input) {
    check_twin(input);
    const at::Tensor h = call<at::Tensor>(f, input);
    return Rule::apply(input, h, split_dim());
  }

  int64_t split_dim() const override {
    return split_dim_.value_or(CouplingOptions().split_dim());
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<AffineAdapterImpl>(detail::clone(f, device));
    copy->split_dim_ = split_dim_;
    copy->twin_ = twin_;
    copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::" << Rule::kName << "(split_dim=" << split_dim() << ")";
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

  std::optional<int64_t> split_dim_; // none before a coupling gives its own
  std::optional<int64_t> twin_; // split_dim, counted from the other end
};

} // namespace detail

template <class F>
using AffineAdapterNaiveImpl = detail::AffineAdapterImpl<F, detail::NaiveRule>;

template <class F>
using AffineAdapterSigmoidImpl =
    detail::AffineAdapterImpl<F, detail::SigmoidRule>;

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

} // namespace memcnn
