// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"
#include "train/libtorch/generators.h"
#include "train/step/trainer.h"
#include "train/weights/state_dict.h"

#include <fmt/format.h>
#include <torch/nn/module.h>
#include <torch/utils.h>

#include <cstddef>
#include <string>

namespace training {

namespace detail {

/// Parameters, buffers and momentum: the tensors themselves, not copies.
inline StateDict learned_tensors(Trainer& trainer) {
  StateDict tensors;
  const torch::NoGradGuard no_grad;
  const auto parameters = trainer.network().named_parameters();
  for (const auto& item : parameters) {
    tensors.insert("network." + item.key(), item.value());
  }
  const auto& momentum = trainer.optimizer().momentum_buffers();
  for (size_t i = 0; i < momentum.size(); ++i) {
    tensors.insert("momentum." + parameters[i].key(), momentum[i]);
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
