// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/revnet.h"
#include "support/error.h"
#include "train/base/config.h"
#include "train/step/memory_budget.h"

#include <torch/nn.h>

#include <cstdint>
#include <string>
#include <vector>

namespace training {

inline const std::vector<std::string>& model_names() {
  static const auto all = revnet::names();
  return all;
}

/// Whether a model has blocks that can recompute their activations.
inline bool is_reversible(const std::string& model) {
  return revnet::named(model).reversible();
}

/// Engines that save memory; models that are not reversible have "plain" only.
inline const std::vector<std::string>& engine_names() {
  static const std::vector<std::string> all{"sequence", "wrapper"};
  return all;
}

/// The configuration of the same network under plain autograd.
inline Config plain_twin(Config config) {
  config.engine = "plain";
  config.memory_budget = 0;
  config.checkpoint_transitions = false;
  return config;
}

/// Whether memcnn::PlainAutogradGuard is to run a configuration's network.
inline bool is_plain(const Config& config) {
  return config.engine == "plain";
}

/// How images and weights of convolutions may lie in memory.
inline const std::vector<std::string>& memory_format_names() {
  static const std::vector<std::string> all{"channels-last", "contiguous"};
  return all;
}

inline at::MemoryFormat memory_format_of(const Config& config) {
  return config.memory_format == "channels-last"
      ? at::MemoryFormat::ChannelsLast
      : at::MemoryFormat::Contiguous;
}

/// Builds the network of a configuration, which computes a slice of each batch
/// in each of `processes`. The same seed gives the same weights under every
/// engine.
inline revnet::RevNet
make_network(const Config& config, int64_t num_classes, int64_t processes = 1) {
  constexpr int64_t kBytesPerMebibyte = 1024 * 1024;
  auto options = revnet::named(config.model)
                     .num_classes(num_classes)
                     .engine(
                         config.engine == "wrapper" ? revnet::Engine::kWrapper
                                                    : revnet::Engine::kSequence)
                     .fractional_bits(config.fractional_bits)
                     .checkpoint_transitions(config.checkpoint_transitions);
  if (config.memory_budget > 0) {
    options.memory_budgets(shares_of(
        config.memory_budget * kBytesPerMebibyte,
        result_bytes(
            options,
            config.batch_size / processes,
            /*number_bytes=*/config.amp ? 2 : 4)));
  }
  torch::manual_seed(config.seed);
  revnet::RevNet network(options);
  for (torch::Tensor& parameter : network->parameters()) {
    if (parameter.dim() == 4) { // the weight of a convolution
      // Not by contiguous(), which leaves those of 1 x 1 as they are: gradients
      // have all strides of the format.
      parameter.set_data(
          torch::empty_like(parameter, {}, memory_format_of(config))
              .copy_(parameter.detach()));
    }
  }
  return network;
}

} // namespace training
