// SPDX-License-Identifier: MIT
#pragma once

// Stochastic gradient descent that may be a part of a CapturedStep:
//
//   revnet::FusedSgd optimizer(net->parameters(), SGDOptions(0.1).momentum(0.9));
//   revnet::CapturedStep step(device, [&](const std::vector<Tensor>& batch) {
//     optimizer.zero_grad();
//     ...
//     optimizer.step(revnet::not_finite(loss));
//   });
//   optimizer.set_lr(0.01); // before any call of step
//
// Copy this file and captured_step.h into a project that links LibTorch.

#include "captured_step.h"

#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <ATen/ops/_fused_sgd.h>

#if REVNET_HAS_CUDA_GRAPHS
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include <cstdint>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

namespace revnet {

/// 1 where a value of a loss is not finite, else 0: a float32 scalar on its
/// device, as FusedSgd::step() takes it.
inline torch::Tensor not_finite(const torch::Tensor& loss) {
  return loss.detach().isfinite().all().logical_not().to(torch::kFloat32);
}

namespace detail {

/// Whether a step is being captured on the current stream of a device.
inline bool is_capturing([[maybe_unused]] torch::Device device) {
#if REVNET_HAS_CUDA_GRAPHS
  return device.is_cuda() &&
      c10::cuda::currentStreamCaptureStatusMayInitCtx() !=
      c10::cuda::CaptureStatus::None;
#else
  return false;
#endif
}

/// `tensor` with the strides of `like`, which is dense, for a kernel that goes
/// through the memory of both alike. Copies only if the order in memory differs:
/// the strides of a 1 x 1 kernel also do where it is the same.
inline torch::Tensor laid_out_as(
    const torch::Tensor& like,
    const torch::Tensor& tensor) {
  bool same_order = true;
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    same_order = same_order &&
        (like.size(dim) == 1 || like.stride(dim) == tensor.stride(dim));
  }
  return same_order ? tensor.as_strided(like.sizes(), like.strides())
                    : torch::empty_like(like).copy_(tensor);
}

} // namespace detail

/// Stochastic gradient descent as torch::optim::SGD, in one kernel for many
/// parameters, with a learning rate that is a tensor: what set_lr() sets holds
/// for the next replay of a graph, too.
///
/// Dtypes:   floating point, one for all parameters, which are dense and on one
///           device.
/// Memory:   as much as the parameters, if there is momentum.
/// Throws:   c10::ValueError if parameters or options are others.
class FusedSgd final {
 public:
  using Tensors = std::vector<torch::Tensor>;

  FusedSgd(Tensors parameters, torch::optim::SGDOptions options)
      : parameters_(std::move(parameters)), options_(std::move(options)) {
    check_options();
    check_parameters();
    const auto kind = parameters_[0].options().requires_grad(false);
    // The kernels of a GPU take this type alone.
    const bool exact = parameters_[0].is_cpu();
    lr_ = torch::full(
        {},
        options_.lr(),
        kind.dtype(exact ? torch::kFloat64 : torch::kFloat32));
    if (options_.momentum() != 0) {
      const torch::NoGradGuard no_grad;
      for (const torch::Tensor& parameter : parameters_) {
        momentum_buffers_.push_back(torch::zeros_like(parameter));
      }
    }
  }

  /// Sets the learning rate of the steps to come. Not a part of a captured
  /// step: every replay would set it again.
  void set_lr(double lr) {
    TORCH_CHECK(
        !detail::is_capturing(lr_.device()),
        "FusedSgd::set_lr(): expected a call outside of a captured step, but got "
        "one while it is captured. Set the learning rate before the step.");
    TORCH_CHECK_VALUE(
        lr >= 0,
        "FusedSgd::set_lr(): expected a learning rate of 0 or more, but got ",
        lr,
        ".");
    options_.lr(lr);
    lr_.fill_(lr);
  }

  double lr() const {
    return options_.lr();
  }

  /// Sets the gradients to none.
  void zero_grad() {
    for (torch::Tensor& parameter : parameters_) {
      parameter.mutable_grad().reset();
    }
  }

  /// Updates the parameters that have a gradient. Changes nothing where
  /// `found_inf`, a float32 scalar on their device, is 1.
  void step(const std::optional<torch::Tensor>& found_inf = std::nullopt) {
    const torch::NoGradGuard no_grad;
    // A learning rate elsewhere would be a number in a graph.
    TORCH_CHECK(
        parameters_[0].device() == lr_.device(),
        "FusedSgd::step(): expected parameters on ",
        lr_.device(),
        " as they were for the constructor, but got them on ",
        parameters_[0].device(),
        ". Move the module before its optimiser is made.");
    Tensors parameters, gradients, buffers;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const torch::Tensor& parameter = parameters_[i];
      if (!parameter.grad().defined()) {
        continue;
      }
      parameters.push_back(parameter);
      gradients.push_back(detail::laid_out_as(parameter, parameter.grad()));
      if (!momentum_buffers_.empty()) {
        torch::Tensor& buffer = momentum_buffers_[i];
        buffer = detail::laid_out_as(parameter, buffer);
        buffers.push_back(buffer);
      }
    }
    if (parameters.empty()) {
      return;
    }
    at::_fused_sgd_(
        parameters,
        gradients,
        buffers,
        options_.weight_decay(),
        options_.momentum(),
        lr_,
        /*dampening=*/0,
        options_.nesterov(),
        /*maximize=*/false,
        /*is_first_step=*/false, // buffers begin as zeros
        /*grad_scale=*/std::nullopt,
        found_inf);
  }

  /// One for each parameter; none without momentum.
  const Tensors& momentum_buffers() const {
    return momentum_buffers_;
  }

  /// Writes the buffers in place, so that a captured step goes on from them.
  void set_momentum_buffers(const Tensors& buffers) {
    TORCH_CHECK_VALUE(
        buffers.size() == momentum_buffers_.size(),
        "FusedSgd::set_momentum_buffers(): expected ",
        momentum_buffers_.size(),
        " buffers, but got ",
        buffers.size(),
        ".");
    for (size_t i = 0; i < buffers.size(); ++i) {
      TORCH_CHECK_VALUE(
          buffers[i].sizes() == momentum_buffers_[i].sizes(),
          "FusedSgd::set_momentum_buffers(): expected buffer ",
          i,
          " of sizes ",
          momentum_buffers_[i].sizes(),
          ", but got ",
          buffers[i].sizes(),
          ".");
    }
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < buffers.size(); ++i) {
      momentum_buffers_[i].copy_(buffers[i]);
    }
  }

 private:
  void check_options() const {
    TORCH_CHECK_VALUE(
        options_.lr() >= 0 && options_.momentum() >= 0 &&
            options_.weight_decay() >= 0 && options_.dampening() == 0 &&
            (!options_.nesterov() || options_.momentum() > 0),
        "FusedSgd::FusedSgd(): expected lr, momentum and weight_decay to be 0 "
        "or more, no dampening, and nesterov with momentum alone, but got lr=",
        options_.lr(),
        ", momentum=",
        options_.momentum(),
        ", weight_decay=",
        options_.weight_decay(),
        ", dampening=",
        options_.dampening(),
        ", nesterov=",
        options_.nesterov(),
        ".");
  }

  void check_parameters() const {
    TORCH_CHECK_VALUE(
        !parameters_.empty(),
        "FusedSgd::FusedSgd(): expected one parameter or more, but got none.");
    std::unordered_set<const c10::TensorImpl*> seen;
    const torch::Tensor& first = parameters_[0];
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const torch::Tensor& parameter = parameters_[i];
      TORCH_CHECK_VALUE(
          parameter.is_floating_point() &&
              parameter.is_non_overlapping_and_dense() &&
              parameter.dtype() == first.dtype() &&
              parameter.device() == first.device() &&
              seen.insert(parameter.unsafeGetTensorImpl()).second,
          "FusedSgd::FusedSgd(): expected distinct, dense parameters of one "
          "floating point dtype on one device, but got parameter ",
          i,
          " of sizes ",
          parameter.sizes(),
          " and strides ",
          parameter.strides(),
          ", ",
          parameter.dtype(),
          " on ",
          parameter.device(),
          ", after ",
          first.dtype(),
          " on ",
          first.device(),
          ".");
    }
  }

  Tensors parameters_;
  torch::optim::SGDOptions options_;
  torch::Tensor lr_;
  Tensors momentum_buffers_;
};

} // namespace revnet
