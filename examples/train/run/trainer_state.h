// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"
#include "train/libtorch/generators.h"
#include "train/step/trainer.h"
#include "train/weights/state_dict.h"

#include <fmt/format.h>
#include <torch/nn/module.h>
#include <torch/optim/sgd.h>
#include <torch/utils.h>

#include <memory>
#include <string>
#include <utility>

namespace training {

namespace detail {

/// What SGD keeps of a parameter's gradients: a tensor like it, made where the
/// first step is still to come.
inline torch::Tensor momentum_of(
    const torch::Tensor& parameter,
    torch::optim::SGD& optimizer) {
  auto& state = optimizer.state()[parameter.unsafeGetTensorImpl()];
  if (!state) {
    auto made = std::make_unique<torch::optim::SGDParamState>();
    made->momentum_buffer(torch::zeros_like(parameter));
    state = std::move(made);
  }
  return static_cast<torch::optim::SGDParamState&>(*state).momentum_buffer();
}

inline bool has_momentum(torch::optim::SGD& optimizer) {
  const auto& options = optimizer.param_groups().front().options();
  return static_cast<const torch::optim::SGDOptions&>(options).momentum() != 0;
}

/// Parameters, buffers and momentum: the tensors themselves, not copies.
inline StateDict learned_tensors(Trainer& trainer) {
  StateDict tensors;
  const torch::NoGradGuard no_grad;
  const bool with_momentum = has_momentum(trainer.optimizer());
  for (const auto& item : trainer.network().named_parameters()) {
    tensors.insert("network." + item.key(), item.value());
    if (with_momentum) {
      tensors.insert(
          "momentum." + item.key(),
          momentum_of(item.value(), trainer.optimizer()));
    }
  }
  for (const auto& item : trainer.network().named_buffers()) {
    tensors.insert("network." + item.key(), item.value());
  }
  return tensors;
}

} // namespace detail

/// All tensors that a trainer needs to go on as if it had never stopped.
inline StateDict trainer_state(Trainer& trainer) {
  StateDict tensors = detail::learned_tensors(trainer);
  tensors.insert("generator.cpu", generator_state(torch::kCPU));
  if (trainer.device().is_cuda()) {
    tensors.insert("generator.cuda", generator_state(trainer.device()));
  }
  return tensors;
}

/// Goes on from what trainer_state() returned, on a GPU from that of a CPU, too.
///
/// Throws:   FormatError if a tensor is missing, or like no other of its name.
inline void restore_trainer(const StateDict& tensors, Trainer& trainer) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : detail::learned_tensors(trainer)) {
    torch::Tensor target = item.value();
    const torch::Tensor& source = tensor_in(tensors, item.key());
    if (source.sizes() != target.sizes() || source.dtype() != target.dtype()) {
      throw FormatError(fmt::format(
          "its tensor {} has {} instead of {}",
          item.key(),
          described(source),
          described(target)));
    }
    target.copy_(source);
  }
  set_generator_state(torch::kCPU, tensor_in(tensors, "generator.cpu"));
  if (trainer.device().is_cuda() && tensors.contains("generator.cuda")) {
    set_generator_state(trainer.device(), tensors["generator.cuda"]);
  }
}

} // namespace training
