// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/check_input.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/isometry.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// Stops where a dimension is none of the input's, or the samples'. `place`
/// begins the message.
inline void
check_dim(const std::string& place, const at::Tensor& input, int64_t dim) {
  check_floating_point(place, input);
  const int64_t dims = input.dim();
  TORCH_CHECK_VALUE(
      -dims < dim && dim < dims && dim != 0,
      place,
      "expected an input with a dim ",
      dim,
      " that is not the samples', 0, but got ",
      describe(input),
      ". Add a dimension, or name another one.");
}

} // namespace detail

/// Options of Permutation; fixed once it is constructed.
struct PermutationOptions {
  /// The dimension whose entries change places; negative values count from the
  /// end. Not that of the samples, 0. Default: 1, the channels of (N, C, *).
  TORCH_ARG(int64_t, dim) = 1;
};

/// The module behind Permutation.
class PermutationImpl final : public torch::nn::Cloneable<PermutationImpl>,
                              public detail::Isometry {
 public:
  /// A random one, of the default generator.
  explicit PermutationImpl(
      int64_t channels,
      const PermutationOptions& options = {})
      : permutation(at::randperm(checked(channels))), options_(options) {
    reset();
  }

  /// Entry i of the result is entry permutation[i] of the input.
  explicit PermutationImpl(
      const std::vector<int64_t>& permutation_,
      const PermutationOptions& options = {})
      : permutation(checked(permutation_)), options_(options) {
    reset();
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given; fixed since then.
  const PermutationOptions& options() const {
    return options_;
  }

  void reset() override {
    permutation = register_buffer("permutation", permutation.clone());
  }

  /// Moves the indices, and leaves their dtype: others may not tell all of them
  /// apart.
  void to(torch::Device device, bool non_blocking = false) override {
    Module::to(device, non_blocking);
  }
  void to(
      torch::Device device,
      torch::Dtype /*dtype*/,
      bool non_blocking = false) override {
    Module::to(device, non_blocking);
  }
  void to(torch::Dtype /*dtype*/, bool /*non_blocking*/ = false) override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::Permutation(channels=" << permutation.numel()
           << ", dim=" << options_.dim() << ")";
  }

  /// (C), integers: a buffer, so that it is saved, and moves with to(device).
  at::Tensor permutation;

 private:
  static int64_t checked(int64_t channels) {
    TORCH_CHECK_VALUE(
        channels > 0,
        "Permutation::Permutation(): expected a number of channels above 0, but "
        "got ",
        channels,
        ". Give the number of entries of the dimension.");
    return channels;
  }

  static at::Tensor checked(const std::vector<int64_t>& permutation) {
    std::vector<bool> is_met(permutation.size());
    for (const int64_t index : permutation) {
      const auto i = static_cast<size_t>(index); // a negative one is large
      TORCH_CHECK_VALUE(
          i < is_met.size() && !is_met[i],
          "Permutation::Permutation(): expected each index from 0 to ",
          static_cast<int64_t>(is_met.size()) - 1,
          " once, but got ",
          permutation,
          ". Name every entry of the dimension once.");
      is_met[i] = true;
    }
    return at::tensor(permutation, at::kLong);
  }

  at::Tensor mapped(Direction direction, at::Tensor input) const override {
    const std::string place = detail::place_of("Permutation", direction);
    const int64_t dim = options_.dim();
    detail::check_dim(place, input, dim);
    TORCH_CHECK_VALUE(
        input.size(dim) == permutation.numel(),
        place,
        "expected ",
        permutation.numel(),
        " entries in dim ",
        dim,
        ", but got ",
        detail::describe(input),
        ". Give as many indices as the dimension has entries.");
    return detail::laid_out_as(
        input,
        detail::with_dense_gradient(input).index_select(
            dim,
            direction == Direction::kForward ? permutation
                                             : permutation.argsort()));
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "Permutation";
  }

  PermutationOptions options_;
};

/// Changes the places of channels, by a permutation that is fixed.
///
/// Shapes:   (N, C, *) to the same; with PermutationOptions any dimension but
///           the first.
/// Dtypes:   floating point; values are moved, not computed.
/// Log-det:  0.
/// Memory:   keeps nothing; makes one copy each way.
/// Accuracy: exact.
/// Throws:   c10::ValueError for indices that are no permutation, and another
///           number of channels.
/// Avoid if: halves are to change places: SwapHalves makes no copy between
///           couplings.
/// Example:
///   memcnn::Permutation reversed({3, 2, 1, 0});
///   memcnn::Permutation random(4); // of the default generator, once
class Permutation : public torch::nn::ModuleHolder<PermutationImpl> {
 public:
  using torch::nn::ModuleHolder<PermutationImpl>::ModuleHolder;
  using Impl = PermutationImpl;

  explicit Permutation(
      std::initializer_list<int64_t> permutation,
      const PermutationOptions& options = {})
      : ModuleHolder(std::vector<int64_t>(permutation), options) {}
};

/// Options of SwapHalves; fixed once it is constructed.
struct SwapHalvesOptions {
  /// The dimension whose halves change places, that of the couplings around it;
  /// negative values count from the end. Not that of the samples, 0. Default: 1,
  /// the channels of (N, C, *).
  TORCH_ARG(int64_t, split_dim) = 1;
};

/// The module behind SwapHalves.
class SwapHalvesImpl final : public torch::nn::Cloneable<SwapHalvesImpl>,
                             public detail::TensorMap {
 public:
  explicit SwapHalvesImpl(const SwapHalvesOptions& options = {})
      : options_(options) {}

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// As they were given; fixed since then.
  const SwapHalvesOptions& options() const {
    return options_;
  }

  void reset() override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::SwapHalves(split_dim=" << options_.split_dim() << ")";
  }

 private:
  using Tensors = detail::Tensors;

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& /*recording*/) override {
    check_extras(direction, extras);
    check(direction, inputs);
    return swapped(std::move(inputs));
  }

  /// It undoes itself, and is its own transpose.
  BeforeRun backward_step(
      Direction /*direction*/,
      AfterRun after,
      Recording& /*recording*/,
      ParameterGradients& /*parameters*/) override {
    BeforeRun before;
    before.inputs = after.kept_inputs[0].defined()
        ? std::move(after.kept_inputs)
        : swapped(std::move(after.outputs));
    before.grad_inputs = after.needs_grad[0] || after.needs_grad.back()
        ? swapped(std::move(after.grad_outputs))
        : Tensors(before.inputs.size());
    return before;
  }

  Tensors swapped(Tensors tensors) const {
    if (tensors.size() == 2) {
      std::swap(tensors[0], tensors[1]);
    } else if (tensors[0].defined()) {
      const int64_t dim = options_.split_dim();
      const at::Tensor whole = detail::with_dense_gradient(tensors[0]);
      const int64_t half = whole.size(dim) / 2;
      tensors[0] = at::cat(
          {whole.narrow(dim, half, half), whole.narrow(dim, 0, half)}, dim);
    }
    return tensors;
  }

  /// Stops where the input has no two halves of one size.
  void check(Direction direction, const Tensors& inputs) const {
    const std::string place = detail::place_of("SwapHalves", direction);
    const int64_t dim = options_.split_dim();
    int64_t size = 0;
    for (const at::Tensor& input : inputs) {
      detail::check_dim(place, input, dim);
      size += input.size(dim);
    }
    TORCH_CHECK_VALUE(
        size % 2 == 0,
        place,
        "expected an even size in dim ",
        dim,
        ", but got ",
        size,
        " (input ",
        detail::describe(inputs[0]),
        "). Give an even number of channels, or use a Permutation.");
  }

  LogDet log_det() const override {
    return LogDet::kZero;
  }

  std::optional<int64_t> takes_halves_of() const override {
    return options_.split_dim();
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "SwapHalves";
  }

  SwapHalvesOptions options_;
};

/// Exchanges the two halves of a tensor, so that a one-sided coupling after it
/// updates the other one.
///
/// Shapes:   (N, C, *) to the same, C even; with SwapHalvesOptions another
///           dimension.
/// Dtypes:   floating point; values are moved, not computed.
/// Log-det:  0.
/// Memory:   keeps nothing; between couplings of the same split_dim it copies
///           nothing, by itself it makes one copy.
/// Accuracy: exact.
/// Throws:   c10::ValueError for an odd size.
/// Example:
///   memcnn::ReversibleSequence flow(one_sided, memcnn::SwapHalves(), another);
class SwapHalves : public torch::nn::ModuleHolder<SwapHalvesImpl> {
 public:
  using torch::nn::ModuleHolder<SwapHalvesImpl>::ModuleHolder;
  using Impl = SwapHalvesImpl;
};

} // namespace memcnn
