// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/revnet.h"
#include "train/weights/overwrite.h"
#include "train/weights/state_dict.h"

#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>

#include <filesystem>
#include <string>
#include <utility>

namespace training {

namespace detail {

/// Collects the weights of a network under their names in Python.
class PythonState final {
 public:
  explicit PythonState(const revnet::RevNetImpl& network) {
    add(*network.stem->ptr(0), "conv1");
    add(*network.stem->ptr(1), "bn1");
    add_trunk(*network.trunk);
    add(*network.head->ptr(0), "bn_final");
    add(*network.head->ptr(4), "fc");
  }

  StateDict take() {
    return std::move(state_);
  }

 private:
  /// Parameters and buffers of one layer.
  void add(const torch::nn::Module& layer, const std::string& name) {
    for (const auto& item : layer.named_parameters(/*recurse=*/false)) {
      state_.insert(name + "." + item.key(), item.value());
    }
    for (const auto& item : layer.named_buffers(/*recurse=*/false)) {
      state_.insert(name + "." + item.key(), item.value());
    }
  }

  /// Blocks are one list here, and lists layer1, layer2 and so on in Python: a
  /// block that changes the shape begins a new one, and so does the first.
  void add_trunk(const torch::nn::SequentialImpl& trunk) {
    int group = 0;
    int block = 0; // within the group
    const auto next_name = [&] {
      return "layer" + std::to_string(group) + "." + std::to_string(block++);
    };
    for (const auto& entry : trunk.children()) {
      const auto* residual = entry->as<revnet::ResidualBlock>();
      if (group == 0 || (residual != nullptr && residual->shortcut)) {
        ++group;
        block = 0;
      }
      if (residual != nullptr) {
        add_residual(*residual, next_name());
        continue;
      }
      const auto& run = *entry->as<revnet::ReversibleBlocks>();
      for (const auto& coupling : run.blocks->children()) {
        const auto branches = coupling->named_children();
        const std::string name = next_name() + ".revblock._fn.";
        add_branch(*branches["Fm"], name + "Fm");
        add_branch(*branches["Gm"], name + "Gm");
      }
    }
  }

  void add_residual(
      const revnet::ResidualBlockImpl& block,
      const std::string& name) {
    add_branch(
        *block.branch,
        name +
            (block.options.bottleneck ? ".bottleneck_sub" : ".basicblock_sub"));
    if (block.shortcut) {
      add(*block.shortcut->ptr(0), name + ".downsample.0");
      add(*block.shortcut->ptr(1), name + ".downsample.1");
    }
  }

  /// Normalisations have the number of the convolution that follows them.
  void add_branch(const torch::nn::Module& layers, const std::string& name) {
    int number = 1;
    for (const auto& layer : layers.children()) {
      if (layer->as<torch::nn::BatchNorm2d>() != nullptr) {
        add(*layer, name + ".bn" + std::to_string(number));
      } else if (layer->as<torch::nn::Conv2d>() != nullptr) {
        add(*layer, name + ".conv" + std::to_string(number++));
      }
    }
  }

  StateDict state_;
};

} // namespace detail

/// Parameters and buffers of a network, by the names that they have in Python
/// MemCNN's memcnn.models.resnet.ResNet: the tensors themselves, not copies.
inline StateDict python_state(const revnet::RevNetImpl& network) {
  return detail::PythonState(network).take();
}

/// Overwrites the weights of a network with those of a Python state dict;
/// floating-point values are rounded to the network's dtype.
///
/// Throws:   Error if the file cannot be read, or has not the very entries of
///           the network; the network is then as it was. `model` is its name.
inline void load_python_weights(
    const std::filesystem::path& path,
    const std::string& model,
    const revnet::RevNetImpl& network) {
  overwrite(python_state(network), model, path);
}

/// Writes the weights of a network as a state dict of Python MemCNN's.
///
/// Throws:   Error if the file cannot be written.
inline void save_python_weights(
    const std::filesystem::path& path,
    const revnet::RevNetImpl& network) {
  write_state_dict(path, python_state(network), "--save-weights");
}

} // namespace training
