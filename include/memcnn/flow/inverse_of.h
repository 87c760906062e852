// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/any_invertible.h>
#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/check_input.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {

/// The module behind InverseOf.
class InverseOfImpl final : public torch::nn::Cloneable<InverseOfImpl>,
                            public detail::TensorMap {
 public:
  explicit InverseOfImpl(AnyInvertible module)
      : inner(std::move(module)), block_(inner.invertible_) {
    reset();
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  void reset() override {
    register_module("inner", inner.ptr());
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy = std::make_shared<InverseOfImpl>(inner.clone(device));
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::InverseOf";
  }

  AnyInvertible inner;

 private:
  using Tensors = detail::Tensors;

  /// A sequence saves memory by itself.
  WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) override {
    check(direction, input);
    return map_of(
        *inner.ptr(),
        *block_,
        opposite(direction),
        input,
        conditions,
        with_log_det);
  }

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check(direction, inputs[0]);
    return block_->run_with(
        opposite(direction), std::move(inputs), extras, recording);
  }

  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    return block_->backward_step(
        opposite(direction), std::move(after), recording, parameters);
  }

  /// By the direction that the caller knows.
  static void check(Direction direction, const at::Tensor& input) {
    detail::check_floating_point(
        detail::place_of("InverseOf", direction), input);
  }

  LogDet log_det() const override {
    return block_->log_det();
  }

  std::optional<size_t> condition_count() const override {
    return block_->condition_count();
  }

  std::optional<int64_t> takes_halves_of() const override {
    return block_->takes_halves_of();
  }

  bool takes_halves_along(int64_t dim) const override {
    return block_->takes_halves_along(dim);
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "InverseOf";
  }

  std::shared_ptr<Invertible> block_;
};

/// An invertible module turned round: its forward is the module's inverse, and
/// the other way about. It makes an up-sampling of a down-sampling.
///
/// Shapes:   those of the module, exchanged.
/// Dtypes:   those of the module.
/// Log-det:  that of the module's inverse: the negative of its forward's.
/// Memory:   that of the module, whose backward step it uses.
/// Accuracy: that of the module.
/// Throws:   what the module throws.
/// Caution:  InverseOf(another) of an InverseOf is, as for every holder, another
///           handle of the same module: its inner module is the way back.
/// Example:
///   memcnn::InverseOf up(memcnn::Squeeze(2)); // (N, 4 C, H, W) to (N, C, 2 H, 2 W)
class InverseOf : public torch::nn::ModuleHolder<InverseOfImpl> {
 public:
  using torch::nn::ModuleHolder<InverseOfImpl>::ModuleHolder;
  using Impl = InverseOfImpl;
};

} // namespace memcnn
