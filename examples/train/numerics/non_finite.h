// SPDX-License-Identifier: MIT
#pragma once

#include "support/autocast_guard.h"
#include "train/data/batches.h"
#include "train/numerics/blocks.h"
#include "train/numerics/trial_copy.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/nn.h>
#include <torch/types.h>

#include <optional>
#include <string>

namespace training {

/// Where nothing else is found.
inline constexpr const char* kFiniteLogits =
    "the loss, which is made of finite logits";

namespace detail {

inline bool is_finite(const torch::Tensor& tensor) {
  return torch::isfinite(tensor).all().item<bool>();
}

/// Names the first of these tensors that holds NaN or infinity, if there is one.
inline std::optional<std::string> non_finite_tensor(
    const torch::OrderedDict<std::string, torch::Tensor>& tensors,
    const char* what,
    const char* kind) {
  std::string first;
  size_t count = 0;
  for (const auto& tensor : tensors) {
    if (!is_finite(tensor.value())) {
      first = count++ == 0 ? tensor.key() : first;
    }
  }
  if (count == 0) {
    return std::nullopt;
  }
  return fmt::format(
      "{} {} ({} of {} {} are not finite)",
      what,
      first,
      count,
      tensors.size(),
      kind);
}

/// Looks at all that the network computes with. In train mode that is without
/// its running statistics: they are not finite where what they are of was not.
inline std::optional<std::string> non_finite_state(
    const torch::nn::Module& network) {
  auto found = non_finite_tensor(
      network.named_parameters(), "the weights", "parameters");
  if (!found && !network.is_training()) {
    found = non_finite_tensor(
        network.named_buffers(), "the running statistics", "buffers");
  }
  return found;
}

/// Names the first block that makes NaN or infinity out of finite values, if
/// there is one: all later ones hand it on.
inline std::optional<std::string> non_finite_block(
    const revnet::RevNetImpl& network,
    const Batch& batch,
    bool autocast) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = batch.images.device();
  TrialCopy copy(network, device, network.is_training());
  const support::AutocastGuard guard(device.type(), autocast);
  torch::Tensor values = batch.images;
  if (!is_finite(values)) {
    return "the images of the batch";
  }
  for (const NamedBlock& block : blocks_of(copy.network())) {
    values = block.forward(values);
    if (!is_finite(values)) {
      return "the output of " + block.name();
    }
  }
  return std::nullopt;
}

} // namespace detail

/// Where NaN or infinity comes from, as the end of "The first value that is not
/// finite is in ...": a parameter, a running statistic in eval mode or, where all
/// are finite, the first block that makes it when the batch runs again in the
/// network's mode. Empty where it cannot be told.
///
/// The network and the default generators stay as they are.
inline std::string origin_of_non_finite(
    const revnet::RevNetImpl& network,
    const Batch& batch,
    bool autocast = false) {
  try {
    if (const auto state = detail::non_finite_state(network)) {
      return *state;
    }
    return detail::non_finite_block(network, batch, autocast)
        .value_or(kFiniteLogits);
  } catch (const c10::Error&) {
    // It goes beside another message, which must not be lost.
    return "";
  }
}

} // namespace training
