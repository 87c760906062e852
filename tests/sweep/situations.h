// SPDX-License-Identifier: MIT
#pragma once

#include "layers.h"

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace memcnn_test {

/// In which form a layer meets its argument.
struct Situation {
  using Arrange = std::function<torch::Tensor(const torch::Tensor&)>;

  std::string name;
  int64_t batch;
  int64_t channels; // of a half
  int depth; // couplings in a chain
  torch::ScalarType dtype;
  bool training;
  int64_t least_dims; // of an argument that can be in it
  Arrange arrange; // lays the tensor out that leaf() gave

  /// Whether a layer has this situation.
  bool suits(const Layer& layer) const {
    return layer.argument.sizes.size() >= static_cast<size_t>(least_dims) &&
        (layer.any_channels || channels % 2 == 0);
  }

  /// The sizes of an argument of that many times the channels.
  std::vector<int64_t> sizes(const ArgumentKind& kind, int64_t halves) const {
    std::vector<int64_t> sizes = kind.sizes;
    sizes[kind.split_dim()] = halves * channels;
    sizes[kind.batch_dim] = batch;
    return sizes;
  }
};

inline std::vector<Situation> situations() {
  using torch::Tensor;
  const auto as_it_is = [](const Tensor& x) {
    return x;
  };
  const auto channels_last = [](const Tensor& x) {
    return x.contiguous(
        x.dim() == 5 ? torch::MemoryFormat::ChannelsLast3d
                     : torch::MemoryFormat::ChannelsLast);
  };
  const auto transposed = [](const Tensor& x) {
    return x.transpose(-1, -2).contiguous().transpose(-1, -2);
  };
  const auto expanded = [](const Tensor& x) { // images that are all the same
    return x.narrow(0, 0, 1).expand_as(x);
  };
  const auto sliced = [](const Tensor& x) {
    return torch::stack({x, x}, -1).select(-1, 1);
  };
  constexpr auto kFloat = torch::kFloat;
  return {
      {"Contiguous", 3, 4, 3, kFloat, true, 2, as_it_is},
      {"ChannelsLast", 3, 4, 3, kFloat, true, 4, channels_last},
      {"ChannelsLastBatchOne", 1, 4, 3, kFloat, true, 4, channels_last},
      {"ChannelsLastOneChannel", 3, 1, 3, kFloat, true, 4, channels_last},
      {"Transposed", 3, 4, 3, kFloat, true, 2, transposed},
      {"TransposedBatchOne", 1, 4, 3, kFloat, true, 2, transposed},
      {"Expanded", 3, 4, 3, kFloat, true, 2, expanded},
      {"Sliced", 3, 4, 3, kFloat, true, 2, sliced},
      {"BatchOne", 1, 4, 3, kFloat, true, 2, as_it_is},
      {"BatchZero", 0, 4, 3, kFloat, true, 2, as_it_is},
      {"Float64", 3, 4, 3, torch::kDouble, true, 2, as_it_is},
      {"BFloat16", 3, 4, 1, torch::kBFloat16, true, 2, as_it_is},
      {"EvalMode", 3, 4, 3, kFloat, false, 2, as_it_is},
  };
}

/// Those that a layer has.
inline std::vector<Situation> situations_of(const Layer& layer) {
  std::vector<Situation> found;
  for (const Situation& each : situations()) {
    if (each.suits(layer)) {
      found.push_back(each);
    }
  }
  return found;
}

} // namespace memcnn_test
