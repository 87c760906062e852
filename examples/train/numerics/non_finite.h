// SPDX-License-Identifier: MIT
#pragma once

#include "train/data/batches.h"
#include "train/libtorch/autocast.h"
#include "train/numerics/blocks.h"
#include "train/numerics/trial_copy.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/nn.h>
#include <torch/types.h>

#include <optional>
#include <string>

namespace training {

namespace detail {

inline bool is_finite(const torch::Tensor& tensor) {
  return torch::isfinite(tensor).all().item<bool>();
}

/// Names a parameter that holds NaN or infinity, if there is one.
inline std::optional<std::string> non_finite_parameter(
    const torch::nn::Module& network) {
  const auto parameters = network.named_parameters();
  std::string first;
  size_t count = 0;
  for (const auto& parameter : parameters) {
    if (!is_finite(parameter.value())) {
      first = count++ == 0 ? parameter.key() : first;
    }
  }
  if (count == 0) {
    return std::nullopt;
  }
  return fmt::format(
      "the weights {} ({} of {} parameters are not finite)",
      first,
      count,
      parameters.size());
}

/// Names the first block that makes NaN or infinity out of finite values, if
/// there is one: all later ones hand it on.
inline std::optional<std::string> non_finite_block(
    const revnet::RevNetImpl& network,
    const Batch& batch,
    bool autocast) {
  const torch::NoGradGuard no_grad;
  const torch::Device device = batch.images.device();
  TrialCopy copy(network, device);
  const AutocastGuard guard(device.type(), autocast);
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
/// finite is in ...": a parameter or, where all are finite, the first block
/// that makes it when the batch runs again. Empty where it cannot be told.
///
/// The network and the default generators stay as they are.
inline std::string origin_of_non_finite(
    const revnet::RevNetImpl& network,
    const Batch& batch,
    bool autocast = false) {
  try {
    if (const auto parameter = detail::non_finite_parameter(network)) {
      return *parameter;
    }
    return detail::non_finite_block(network, batch, autocast)
        .value_or("the loss, which is made of finite logits");
  } catch (const c10::Error&) {
    // It goes beside another message, which must not be lost.
    return "";
  }
}

} // namespace training
