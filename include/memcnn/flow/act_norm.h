// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/channels.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/ownership.h>
#include <memcnn/detail/tensor_map.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>

namespace memcnn {
namespace detail {
class ArmedActNorms;
} // namespace detail

/// The module behind ActNorm.
class ActNormImpl final : public torch::nn::Cloneable<ActNormImpl>,
                          public detail::TensorMap {
 public:
  explicit ActNormImpl(int64_t channels) : channels_(channels) {
    detail::check_channel_count("ActNorm", channels);
    reset();
  }

  void reset() override {
    bias = register_parameter("bias", at::zeros({channels_}));
    log_scale = register_parameter("log_scale", at::zeros({channels_}));
  }

  at::Tensor forward(const at::Tensor& input) {
    return TensorMap::forward(input); // AnyModule wants it of this class
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "memcnn::ActNorm(" << channels_ << ")";
  }

  at::Tensor bias; // (C)
  at::Tensor log_scale; // (C)

 private:
  friend class detail::ArmedActNorms;
  using Tensors = detail::Tensors;

  /// The numbers of the channels of one part of the stream, in its dtype, as
  /// they go with its entries.
  struct Numbers {
    at::Tensor bias;
    at::Tensor scale;
  };

  Tensors run_with(
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) override {
    check_extras(direction, extras);
    detail::check_stream("ActNorm", direction, inputs, channels_);
    const detail::NoAutocast no_autocast;
    if (is_armed_) {
      normalise(direction, inputs);
    }
    recording.read(*this);
    add_log_det(direction, inputs[0], extras.log_det);
    int64_t first = 0;
    for (at::Tensor& part : inputs) {
      const Numbers numbers = numbers_for(part, first);
      first += part.size(1);
      const bool builds_graph = detail::is_graph_built({part, bias, log_scale});
      if (!builds_graph && detail::is_sole_owner(part)) {
        apply_in_place(direction, part, numbers);
      } else {
        part = direction == Direction::kForward
            ? (part + numbers.bias) * numbers.scale
            : part / numbers.scale - numbers.bias;
      }
    }
    return inputs;
  }

  static void apply_in_place(
      Direction direction,
      const at::Tensor& part,
      const Numbers& numbers) {
    if (direction == Direction::kForward) {
      part.add_(numbers.bias).mul_(numbers.scale);
    } else {
      part.div_(numbers.scale).sub_(numbers.bias);
    }
  }

  void add_log_det(
      Direction direction,
      const at::Tensor& stream,
      detail::LogDetSum* sum) const {
    if (sum != nullptr) {
      sum->add(
          log_scale.to(detail::LogDetSum::dtype_for(stream)).sum() *
              detail::pixels_of(stream),
          direction == Direction::kForward ? 1 : -1);
    }
  }

  /// Each part and its gradient go from after the run to before it in their own
  /// memory. Nothing else of their size is held, but for a product that is
  /// summed.
  BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) override {
    if (after.kept_inputs[0].defined()) { // nothing is to be undone
      return Invertible::backward_step(
          direction, std::move(after), recording, parameters);
    }
    recording.read(*this);
    const detail::NoAutocast no_autocast;
    const Tensors wanted = parameters.wanted(*this);
    const bool arrived =
        detail::complete_gradients(after.grad_outputs, after.outputs);
    std::array<Tensors, 2> grads; // of bias and log-scale, by parts
    int64_t first = 0;
    for (size_t i = 0; i < after.outputs.size(); ++i) {
      at::Tensor& part = after.outputs[i];
      at::Tensor& grad = after.grad_outputs[i];
      part = detail::owned(std::move(part));
      const Numbers numbers = numbers_for(part, first);
      first += part.size(1);
      if (!arrived) {
        apply_in_place(opposite(direction), part, numbers);
        continue;
      }
      grad = detail::owned_as(part, std::move(grad));
      auto [grad_bias, grad_log_scale] =
          take_back(direction, part, grad, numbers, !wanted.empty());
      grads[0].push_back(std::move(grad_bias));
      grads[1].push_back(std::move(grad_log_scale));
      if (!after.needs_grad[i]) {
        grad.reset();
      }
    }
    for (const at::Tensor& parameter : wanted) {
      const bool is_bias = parameter.is_same(bias);
      const auto add = [&](at::Tensor grad) {
        parameters.add(
            parameter, detail::as_dtype_of(parameter, std::move(grad)));
      };
      if (arrived) {
        add(at::cat(grads[is_bias ? 0 : 1]));
      }
      if (!is_bias && after.grad_log_det.defined()) {
        const int64_t pixels = detail::pixels_of(after.outputs[0]);
        add((after.grad_log_det.sum() *
             (direction == Direction::kForward ? pixels : -pixels))
                .expand({channels_}));
      }
    }
    return {std::move(after.outputs), std::move(after.grad_outputs), {}};
  }

  /// Takes a part of the stream and its gradient from after a run to before it,
  /// and returns the gradients of its bias and log-scale, if they are wanted.
  static std::array<at::Tensor, 2> take_back(
      Direction direction,
      const at::Tensor& part,
      const at::Tensor& grad,
      const Numbers& numbers,
      bool wanted) {
    std::array<at::Tensor, 2> grads;
    if (direction == Direction::kForward) { // y = (x + b) s
      if (wanted) {
        grads[1] = sum_of_channels(grad * part);
      }
      grad.mul_(numbers.scale);
      if (wanted) {
        grads[0] = sum_of_channels(grad);
      }
      apply_in_place(Direction::kInverse, part, numbers);
    } else { // x = y / s - b
      part.add_(numbers.bias);
      if (wanted) {
        grads = {
            sum_of_channels(grad).neg_(), sum_of_channels(grad * part).neg_()};
      }
      part.mul_(numbers.scale);
      grad.div_(numbers.scale);
    }
    return grads;
  }

  static at::Tensor sum_of_channels(const at::Tensor& part) {
    return at::sum(
        part,
        detail::all_but_channels(part),
        /*keepdim=*/false,
        detail::LogDetSum::dtype_for(part));
  }

  Numbers numbers_for(const at::Tensor& part, int64_t first) const {
    const auto slice = [&](const at::Tensor& numbers) {
      return detail::beside_pixels(
          numbers.narrow(0, first, part.size(1)).to(part.scalar_type()), part);
    };
    // The same rounded scale is multiplied by and divided by.
    return {slice(bias), slice(log_scale.exp())};
  }

  /// Sets the parameters so that what this run returns has mean 0 and standard
  /// deviation 1 in each channel; see initialize().
  void normalise(Direction direction, const Tensors& parts) {
    const at::NoGradGuard no_grad;
    int64_t first = 0;
    for (const at::Tensor& part : parts) {
      const at::Tensor wide = part.to(at::kDouble);
      const auto dims = detail::all_but_channels(part);
      const at::Tensor mean = wide.mean(dims);
      const at::Tensor centred = wide - detail::beside_pixels(mean, wide);
      const at::Tensor deviation = centred.square().mean(dims).sqrt();
      const at::Tensor scale =
          at::where(deviation >= kLeastDeviation, deviation, 1.0);
      const bool is_forward = direction == Direction::kForward;
      const auto set = [&](const at::Tensor& parameter, const at::Tensor& to) {
        parameter.narrow(0, first, part.size(1)).copy_(to);
      };
      set(bias, is_forward ? -mean : mean / scale);
      set(log_scale, is_forward ? -scale.log() : scale.log());
      first += part.size(1);
    }
    is_armed_ = false;
  }

  LogDet log_det() const override {
    return LogDet::kSample;
  }

  bool takes_halves_along(int64_t dim) const override {
    return dim == 1;
  }

  torch::nn::Module& module() override {
    return *this;
  }

  std::string type_name() const override {
    return "ActNorm";
  }

  /// A channel that deviates less has no scale to speak of.
  static constexpr double kLeastDeviation = 1e-6;

  int64_t channels_;
  bool is_armed_ = false; // the next run sets the parameters
};

/// Shifts and scales each channel: batch normalisation without the batch.
///
/// \f[ y = (x + b) e^l, \quad x = y e^{-l} - b \f]
///
/// It begins as the identity. initialize() lets the results of all of them in a
/// model begin with mean 0 and deviation 1; nothing says later whether it did,
/// so that there is no flag to save, to copy, or to differ between replicas.
///
/// Shapes:   input, output (N, C, *); bias, log_scale (C).
/// Dtypes:   floating point; computed in the input's dtype, also under autocast.
/// Log-det:  l, summed over channels, times the pixels of one.
/// Memory:   keeps nothing but its output; its backward step works in place.
/// Accuracy: a round trip of one rounds twice.
/// Throws:   c10::ValueError if the input has another number of channels.
/// Source:   Kingma and Dhariwal 2018, Glow, section 3.1, arXiv:1807.03039.
/// Example:
///   memcnn::ReversibleSequence flow(memcnn::ActNorm(12), memcnn::Conv1x1(12));
///   memcnn::initialize(flow, first_batch);
TORCH_MODULE(ActNorm);

} // namespace memcnn
