// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/config.h"

#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/additive.h>
#include <memcnn/coupling/affine.h>
#include <memcnn/coupling/options.h>

#include <torch/nn.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace benchmark {

/// F and G: twice batch normalisation, ReLU and a 3x3 convolution.
inline torch::nn::Sequential residual_function(
    int64_t channels,
    int64_t out_channels) {
  torch::nn::Sequential layers;
  for (const int64_t out : {channels, out_channels}) {
    layers->push_back(torch::nn::BatchNorm2d(channels));
    layers->push_back(torch::nn::ReLU(torch::nn::ReLUOptions(true)));
    layers->push_back(torch::nn::Conv2d(
        torch::nn::Conv2dOptions(channels, out, 3).padding(1).bias(false)));
  }
  return layers;
}

using Additive =
    memcnn::AdditiveCoupling<torch::nn::Sequential, torch::nn::Sequential>;
using Adapter = memcnn::AffineAdapterSigmoid<torch::nn::Sequential>;
using Affine = memcnn::AffineCoupling<Adapter, Adapter>;

/// One coupling of the kind that the configuration asks for.
template <class Coupling>
Coupling make_coupling(const Config& config);

template <>
inline Additive make_coupling<Additive>(const Config& config) {
  memcnn::CouplingOptions options;
  if (config.coupling == "exact") {
    options.fractional_bits(kFractionalBits);
  }
  // In this order, for the same weights on every compiler.
  auto f = residual_function(config.channels, config.channels);
  auto g = residual_function(config.channels, config.channels);
  return Additive(std::move(f), std::move(g), options);
}

template <>
inline Affine make_coupling<Affine>(const Config& config) {
  auto f = residual_function(config.channels, 2 * config.channels);
  auto g = residual_function(config.channels, 2 * config.channels);
  return Affine(Adapter(std::move(f)), Adapter(std::move(g)));
}

/// Holds the parameters only: a convolution from 3 to 2 C channels, then
/// couplings over the two halves of them. An engine decides how they run.
template <class Coupling>
struct Network final : torch::nn::Module {
  explicit Network(const Config& config)
      : stem(register_module(
            "stem",
            torch::nn::Conv2d(
                torch::nn::Conv2dOptions(3, 2 * config.channels, 3)
                    .padding(1)))) {
    for (int64_t i = 0; i < config.depth; ++i) {
      blocks.push_back(register_module(
          "block" + std::to_string(i), make_coupling<Coupling>(config)));
    }
  }

  torch::nn::Conv2d stem;
  std::vector<Coupling> blocks;
};

} // namespace benchmark
