// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/flows_config.h"
#include "glow/glow.h"

#include <memcnn/flow/conv1x1.h>
#include <memcnn/flow/multi_scale.h>
#include <memcnn/sequence.h>

#include <ATen/core/Tensor.h>
#include <torch/nn.h>

#include <cstdint>
#include <string>
#include <vector>

namespace benchmark {

inline memcnn::Parametrization parametrization_of(const std::string& matrix) {
  return matrix == "plain" ? memcnn::kPlain
      : matrix == "lu"     ? memcnn::kLU
                           : memcnn::kOrthogonal;
}

/// A level of Glow: a squeeze to that many channels, and steps of 3 blocks. A
/// new one's branches return zeros; here they matter from the first step.
inline memcnn::ReversibleSequence make_level(
    int64_t channels,
    int64_t width,
    const std::string& matrix,
    int64_t depth) {
  memcnn::ReversibleSequence level = glow::level(
      channels,
      glow::GlowOptions()
          .steps(depth)
          .width(width)
          .parametrization(parametrization_of(matrix))
          .anchor_every(0));
  for (const auto& module : level->modules()) {
    if (auto* conv = module->as<torch::nn::Conv2dImpl>()) {
      conv->reset_parameters();
    }
  }
  return level;
}

/// A Glow on images of 3 channels, with that many steps a level.
inline memcnn::MultiScale make_glow(const FlowConfig& config, int64_t depth) {
  memcnn::MultiScale flow;
  int64_t channels = 3;
  for (int64_t i = 0; i < config.levels; ++i) {
    channels *= 4;
    auto level = make_level(channels, config.width, config.matrix, depth);
    if (config.memory_format == "channels-last") {
      level->options.memory_format(at::MemoryFormat::ChannelsLast);
    }
    flow->push_back(level);
    channels /= 2; // one half is a latent
  }
  return flow;
}

/// The negative log-likelihood in nats of an image, but for a constant.
inline at::Tensor flow_loss(
    const std::vector<at::Tensor>& z,
    const at::Tensor& log_det) {
  at::Tensor sum = -log_det;
  for (const at::Tensor& latent : z) {
    sum = sum + 0.5 * latent.square().flatten(1).sum(1);
  }
  return sum.mean();
}

} // namespace benchmark
