// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/glow.h"
#include "glow/model.h"
#include "support/autocast_guard.h"
#include "train/weights/state_dict.h"

#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adam.h>
#include <torch/utils.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace glow {

/// A flow on a device, and the optimizer of its weights: what a step changes.
class Learner final {
 public:
  Learner(const Config& config, torch::Device device)
      : config_(config),
        model_(make_model(config)),
        optimizer_(moved_to(device), config.learning_rate) {
    // At once, not in the first step: a checkpoint may be read before it.
    for (const torch::Tensor& parameter : model_->parameters()) {
      auto state = std::make_unique<torch::optim::AdamParamState>();
      state->exp_avg(torch::zeros_like(parameter));
      state->exp_avg_sq(torch::zeros_like(parameter));
      optimizer_.state()[parameter.unsafeGetTensorImpl()] = std::move(state);
    }
  }

  Learner(const Learner&) = delete;
  Learner& operator=(const Learner&) = delete;

  /// Lets every ActNorm start from what a batch looks like where it is.
  void initialize(const torch::Tensor& images) {
    memcnn::initialize(model_->flow, images);
  }

  /// Bits for each value, (N).
  torch::Tensor bits(const torch::Tensor& images) {
    const support::AutocastGuard autocast(images.device().type(), config_.amp);
    return bits_per_dim(
        model_->log_prob(images),
        images.numel() / images.size(0),
        config_.learn_bits);
  }

  void zero_grad() {
    optimizer_.zero_grad();
  }

  /// Updates the weights by their gradients, clipped.
  void update(int64_t iteration) {
    torch::nn::utils::clip_grad_norm_(model_->parameters(), config_.clip_norm);
    auto& group = optimizer_.param_groups()[0];
    group.options().set_lr(learning_rate_at(config_, iteration));
    for (const torch::Tensor& parameter : model_->parameters()) {
      state_of(parameter).step(iteration);
    }
    optimizer_.step();
  }

  /// Parameters and their moments: the tensors themselves, not copies.
  training::StateDict learned_tensors() {
    training::StateDict tensors;
    for (const auto& item : model_->named_parameters()) {
      const auto& state = state_of(item.value());
      tensors.insert("network." + item.key(), item.value());
      tensors.insert("mean." + item.key(), state.exp_avg());
      tensors.insert("square." + item.key(), state.exp_avg_sq());
    }
    for (const auto& item : model_->named_buffers()) {
      tensors.insert("network." + item.key(), item.value());
    }
    return tensors;
  }

  Glow& model() {
    return model_;
  }

 private:
  std::vector<torch::Tensor> moved_to(torch::Device device) {
    model_->to(device);
    return model_->parameters();
  }

  torch::optim::AdamParamState& state_of(const torch::Tensor& parameter) {
    return static_cast<torch::optim::AdamParamState&>(
        *optimizer_.state().at(parameter.unsafeGetTensorImpl()));
  }

  Config config_;
  Glow model_;
  torch::optim::Adam optimizer_;
};

} // namespace glow
