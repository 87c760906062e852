// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/any_invertible.h>
#include <memcnn/detail/check_branch.h>
#include <memcnn/detail/check_input.h>
#include <memcnn/detail/dense.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/holder.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// The channels of a stream from some channel on, taken out of it and put back.
/// The stream is one tensor or two halves, of which those that hold none of the
/// channels are not touched.
class PartOfStream {
 public:
  PartOfStream(Tensors stream, int64_t first_channel)
      : stream_(std::move(stream)) {
    int64_t start = first_channel;
    for (size_t i = 0; i < stream_.size(); ++i) {
      const int64_t channels = stream_[i].size(1);
      if (start < channels) {
        const int64_t inside = std::max<int64_t>(start, 0);
        pieces_.push_back({i, inside, channels - inside});
      }
      start -= channels;
    }
  }

  /// The part, dense; a half that it takes all of is given away.
  at::Tensor take() {
    Tensors taken;
    for (const Piece& piece : pieces_) {
      at::Tensor& tensor = stream_[piece.tensor];
      taken.push_back(
          piece.start == 0 ? std::exchange(tensor, at::Tensor())
                           : of(with_dense_gradient(tensor), piece));
    }
    return taken.size() == 1 ? dense(taken[0]) : at::cat(taken, 1);
  }

  /// The stream with a part of the sizes of the one that was taken: in its own
  /// memory where nobody else refers to that, and no graph is built.
  Tensors with(const at::Tensor& part) && {
    int64_t start = 0;
    for (const Piece& piece : pieces_) {
      put(stream_[piece.tensor],
          piece,
          pieces_.size() == 1 ? part : part.narrow(1, start, piece.count));
      start += piece.count;
    }
    return std::move(stream_);
  }

 private:
  /// Which channels of which tensor.
  struct Piece {
    size_t tensor;
    int64_t start;
    int64_t count;
  };

  static at::Tensor of(const at::Tensor& tensor, const Piece& piece) {
    return tensor.narrow(1, piece.start, piece.count);
  }

  static void
  put(at::Tensor& tensor, const Piece& piece, const at::Tensor& part) {
    if (piece.start == 0) {
      tensor = dense(part);
    } else if (
        !(at::GradMode::is_enabled() &&
          (tensor.requires_grad() || part.requires_grad())) &&
        is_sole_owner(tensor)) {
      of(tensor, piece).copy_(part);
    } else {
      tensor = at::cat({tensor.narrow(1, 0, piece.start), part}, 1);
    }
  }

  Tensors stream_;
  std::vector<Piece> pieces_;
};

} // namespace detail

/// The module behind OnPart.
class OnPartImpl final : public torch::nn::Cloneable<OnPartImpl>,
                         public detail::TensorMap {
 public:
  OnPartImpl(AnyInvertible module, int64_t first_channel)
      : inner(std::move(module)),
        first_channel_(first_channel),
        block_(inner.invertible_) {
    TORCH_CHECK_VALUE(
        first_channel > 0,
        "OnPart::OnPart(): expected a first channel from 1 on, but got ",
        first_channel,
        ". Use the module by itself for all channels.");
    reset();
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  /// The first channel that the inner module changes.
  int64_t first_channel() const {
    return first_channel_;
  }

  void reset() override {
    register_module("inner", inner.ptr());
  }

  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<c10::Device>& device = std::nullopt) const override {
    auto copy =
        std::make_shared<OnPartImpl>(inner.clone(device), first_channel_);
    detail::copy_modes(*this, *copy);
    return copy;
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::OnPart(first_channel=" << first_channel_ << ")";
  }

  AnyInvertible inner;

 private:
  using Tensors = detail::Tensors;

  /// By itself it saves what memory the inner module saves by itself.
  WithLogDet map(
      Direction direction,
      const at::Tensor& input,
      const std::vector<at::Tensor>& conditions,
      bool with_log_det) override {
    check(direction, {input});
    detail::PartOfStream stream({input}, first_channel_);
    const at::Tensor part = stream.take();
    WithLogDet result = map_of(
        *inner.ptr(), *block_, direction, part, conditions, with_log_det);
    check_kept(direction, detail::TensorMeta(part), result.output);
    result.output = std::move(stream).with(result.output)[0];
    return result;
  }

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check(direction, inputs);
    detail::PartOfStream stream(std::move(inputs), first_channel_);
    Tensors part = {stream.take()};
    Recording& inside = recording.block(0);
    if (recording.is_recording()) {
      inside.note_inputs(part);
    }
    const detail::TensorMeta like(part[0]);
    const at::Tensor changed =
        block_->run_with(direction, std::move(part), extras, inside)[0];
    check_kept(direction, like, changed);
    return std::move(stream).with(changed);
  }

  /// The inner module's own step, beside what passes it back as well.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) { // nothing is to be rebuilt
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    const bool needs_grad = after.needs_grad[0] || after.needs_grad.back();
    detail::PartOfStream values(std::move(after.outputs), first_channel_);
    std::optional<detail::PartOfStream> grads;
    if (after.grad_outputs[0].defined()) {
      grads.emplace(std::move(after.grad_outputs), first_channel_);
    }
    after.outputs = {values.take()};
    after.grad_outputs = {grads ? grads->take() : at::Tensor()};
    after.kept_inputs.resize(1);
    after.needs_grad = {needs_grad};
    BeforeRun before = step_inside(
        direction, std::move(after), recording.block(0), parameters);

    const at::Tensor part = std::move(before.inputs[0]);
    before.inputs = std::move(values).with(part);
    if (!needs_grad) {
      before.grad_inputs.assign(before.inputs.size(), at::Tensor());
    } else {
      before.grad_inputs = grads_with(
          std::move(grads), before.inputs, part, before.grad_inputs[0]);
    }
    return before;
  }

  BeforeRun step_inside(
      Direction direction,
      AfterRun after,
      Recording& inside,
      ParameterGradients& parameters) const {
    BeforeRun before =
        block_->backward_step(direction, std::move(after), inside, parameters);
    detail::check_rebuilt(
        block_->type_name(),
        name_of(direction),
        "backward_step",
        before.inputs,
        /*kept=*/{at::Tensor()},
        inside.inputs());
    return before;
  }

  /// The gradient of a stream, of which either part may be zero, and is then
  /// undefined.
  Tensors grads_with(
      std::optional<detail::PartOfStream> grads,
      const Tensors& stream,
      const at::Tensor& part,
      const at::Tensor& grad_part) const {
    if (!grads && !grad_part.defined()) {
      return Tensors(stream.size());
    }
    if (!grads) {
      Tensors zeros;
      for (const at::Tensor& tensor : stream) {
        zeros.push_back(at::zeros_like(tensor));
      }
      grads.emplace(std::move(zeros), first_channel_);
    }
    return std::move(*grads).with(
        grad_part.defined() ? grad_part : at::zeros_like(part));
  }

  /// Stops where the input has no such channels.
  void check(Direction direction, const Tensors& inputs) const {
    const std::string place = detail::place_of("OnPart", direction);
    int64_t channels = 0;
    for (const at::Tensor& input : inputs) {
      detail::check_has_channels(place, input);
      channels += input.size(1);
    }
    TORCH_CHECK_VALUE(
        first_channel_ < channels,
        place,
        "expected channels from ",
        first_channel_,
        " on in dim 1, but got ",
        channels,
        " channels (input ",
        detail::describe(inputs[0]),
        "). Choose a first channel that the input has.");
  }

  /// Stops where what the inner module returned does not fit beside what passed.
  void check_kept(
      Direction direction,
      const detail::TensorMeta& part,
      const at::Tensor& changed) const {
    TORCH_CHECK_VALUE(
        part.fits(changed),
        detail::place_of("OnPart", direction),
        "expected the inner module, ",
        block_->type_name(),
        ", to return what fits beside the other channels, ",
        detail::describe(part),
        ", but got ",
        detail::describe(changed),
        ". Let it undo its changes of sizes, as InverseOf(Squeeze(2)) undoes "
        "Squeeze(2).");
  }

  LogDet log_det() const override {
    return block_->log_det();
  }

  std::optional<size_t> condition_count() const override {
    return block_->condition_count();
  }

  bool takes_halves_along(int64_t dim) const override {
    return dim == 1;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "OnPart";
  }

  int64_t first_channel_;
  std::shared_ptr<Invertible> block_;
};

/// Applies an invertible module to the channels from one on, and passes the
/// others by: what a U-Net's skip connection does, or a flow that factors
/// channels out.
///
/// \f[ y = (x_{< c}, f(x_{\ge c})) \f]
///
/// The module may be a ReversibleSequence, and hold another OnPart: a U-Net is
/// one sequence then, whatever its depth.
///
/// Shapes:   (N, C, *) to the same, C above first_channel; the module returns
///           the sizes that it takes.
/// Dtypes:   those of the module.
/// Log-det:  that of the module.
/// Memory:   keeps nothing of its own. In a sequence the other channels stay in
///           their memory, beside a copy of those that the module gets.
/// Accuracy: that of the module.
/// Throws:   c10::ValueError where the input has too few channels, or the module
///           changes sizes.
/// Source:   Etmann et al. 2020, iUNets, arXiv:2005.05220, which splits and
///           joins channels likewise.
/// Example:
///   memcnn::OnPart below(
///       memcnn::ReversibleSequence(
///           memcnn::Squeeze(2), coupling, memcnn::InverseOf(memcnn::Squeeze(2))),
///       24); // channels 24 on
class OnPart : public torch::nn::ModuleHolder<OnPartImpl> {
 public:
  using torch::nn::ModuleHolder<OnPartImpl>::ModuleHolder;
  using Impl = OnPartImpl;
};

} // namespace memcnn
