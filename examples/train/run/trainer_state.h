// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"
#include "train/libtorch/generators.h"
#include "train/weights/state_dict.h"

#include <fmt/format.h>
#include <torch/types.h>
#include <torch/utils.h>

namespace training {

/// All tensors that a trainer, of whatever program, needs to go on as if it had
/// never stopped: its learned_tensors(), and where random numbers are.
template <class Trainer>
StateDict trainer_state(Trainer& trainer) {
  StateDict tensors = trainer.learned_tensors();
  tensors.insert("generator.cpu", generator_state(torch::kCPU));
  if (trainer.device().is_cuda()) {
    tensors.insert("generator.cuda", generator_state(trainer.device()));
  }
  return tensors;
}

/// Goes on from what trainer_state() returned, on a GPU from that of a CPU, too.
///
/// Throws:   FormatError if a tensor is missing, or like no other of its name.
template <class Trainer>
void restore_trainer(const StateDict& tensors, Trainer& trainer) {
  const torch::NoGradGuard no_grad;
  for (const auto& item : trainer.learned_tensors()) {
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
