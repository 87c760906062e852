// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Type.h>
#include <torch/nn/module.h>

#include <string>
#include <string_view>
#include <typeindex>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>

namespace memcnn::detail {

/// Whether LibTorch has a layer of this name that computes its result and does
/// nothing else: it draws no random numbers, and writes no parameter and no
/// buffer but for the statistics of batch normalisation that trains. Named, since
/// a header of each would have to be compiled.
inline bool names_layer_that_only_computes(std::string_view name) {
  static const std::unordered_set<std::string_view> layers = {
      "Sequential",
      "Identity",
      "Linear",
      "Bilinear",
      "Flatten",
      "Unflatten",
      "Conv1d",
      "Conv2d",
      "Conv3d",
      "ConvTranspose1d",
      "ConvTranspose2d",
      "ConvTranspose3d",
      "BatchNorm1d",
      "BatchNorm2d",
      "BatchNorm3d",
      "LayerNorm",
      "GroupNorm",
      "LocalResponseNorm",
      "ReLU",
      "ReLU6",
      "LeakyReLU",
      "PReLU",
      "ELU",
      "SELU",
      "CELU",
      "GELU",
      "SiLU",
      "Mish",
      "GLU",
      "Sigmoid",
      "LogSigmoid",
      "Tanh",
      "Hardtanh",
      "Softplus",
      "Softsign",
      "Softmax",
      "LogSoftmax",
      "AvgPool2d",
      "MaxPool2d",
      "PixelShuffle",
      "PixelUnshuffle",
      "Upsample",
      "ZeroPad2d",
      "ReflectionPad2d",
      "ReplicationPad2d"};
  constexpr std::string_view kBegin = "torch::nn::";
  constexpr std::string_view kEnd = "Impl";
  return name.size() > kBegin.size() + kEnd.size() &&
      name.substr(0, kBegin.size()) == kBegin &&
      name.substr(name.size() - kEnd.size()) == kEnd &&
      layers.count(name.substr(
          kBegin.size(), name.size() - kBegin.size() - kEnd.size())) != 0;
}

/// Whether a part of a module is such a layer, so that its operators need not be
/// looked at. A class derived from one is none.
inline bool only_computes(const torch::nn::Module& part) {
  static thread_local std::unordered_map<std::type_index, bool> known;
  const std::type_info& type = typeid(part);
  const auto [found, is_new] = known.try_emplace(type);
  if (is_new) {
    found->second = names_layer_that_only_computes(c10::demangle(type.name()));
  }
  return found->second;
}

} // namespace memcnn::detail
