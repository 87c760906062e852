// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/resnet.h"
#include "revnet/revnet.h"
#include "support/error.h"
#include "train/base/config.h"

#include <torch/nn.h>

#include <algorithm>
#include <string>
#include <vector>

namespace training {

inline const std::vector<std::string>& model_names() {
  static const std::vector<std::string> all = [] {
    auto names = resnet::names();
    names.insert(names.end(), revnet::names().begin(), revnet::names().end());
    return names;
  }();
  return all;
}

/// Whether a model has blocks that can recompute their activations.
inline bool is_reversible(const std::string& model) {
  const auto& names = revnet::names();
  return std::find(names.begin(), names.end(), model) != names.end();
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

namespace detail {

inline revnet::Engine engine_of(const Config& config) {
  return config.engine == "sequence" ? revnet::Engine::kSequence
      : config.engine == "wrapper"   ? revnet::Engine::kWrapper
                                     : revnet::Engine::kPlain;
}

inline torch::nn::AnyModule build_network(
    const Config& config,
    int64_t num_classes) {
  if (is_reversible(config.model)) {
    constexpr int64_t kBytesPerMebibyte = 1024 * 1024;
    return torch::nn::AnyModule(revnet::RevNet(
        revnet::named(config.model)
            .num_classes(num_classes)
            .engine(engine_of(config))
            .fractional_bits(config.fractional_bits)
            .memory_budget(config.memory_budget * kBytesPerMebibyte)
            .checkpoint_transitions(config.checkpoint_transitions)));
  }
  return torch::nn::AnyModule(
      resnet::ResNet(resnet::named(config.model).num_classes(num_classes)));
}

} // namespace detail

/// Builds the network of a configuration. The same seed gives the same weights
/// under every engine.
inline torch::nn::AnyModule make_network(
    const Config& config,
    int64_t num_classes) {
  torch::manual_seed(config.seed);
  torch::nn::AnyModule network = detail::build_network(config, num_classes);
  for (torch::Tensor& parameter : network.ptr()->parameters()) {
    if (parameter.dim() == 4) { // the weight of a convolution
      parameter.set_data(parameter.contiguous(memory_format_of(config)));
    }
  }
  return network;
}

} // namespace training
