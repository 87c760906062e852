// SPDX-License-Identifier: MIT
#pragma once

#include <torch/nn/modules/container/any.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

namespace memcnn_test {

/// What the argument of a layer is like.
struct ArgumentKind {
  std::vector<int64_t> sizes; // without the channels: 0 stands for them
  int64_t batch_dim;

  int64_t split_dim() const {
    return std::find(sizes.begin(), sizes.end(), 0) - sizes.begin();
  }
};

/// A layer of LibTorch as a branch: it returns the sizes of its argument.
struct Layer {
  std::string name;
  ArgumentKind argument;
  bool any_channels; // or an even number only
  std::function<torch::nn::AnyModule(int64_t channels)> make;
};

inline void PrintTo(const Layer& layer, std::ostream* stream) {
  *stream << layer.name;
}

/// Every kind of layer that LibTorch has and that can be a branch, by itself or
/// with the least around it that gives the sizes back.
std::vector<Layer> layers();

/// Layers that return twice their argument's channels, as the branches of
/// affine couplings do.
std::vector<Layer> doubling_layers();

} // namespace memcnn_test
