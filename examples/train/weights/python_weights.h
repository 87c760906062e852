// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/revnet.h"
#include "support/error.h"
#include "support/printable.h"
#include "train/weights/state_dict.h"

#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/utils.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

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

/// "layer1.weight", and how many more there are like it.
inline std::string first_of(const std::vector<std::string>& names) {
  return "\"" + support::printable(names.front()) + "\"" +
      (names.size() == 1
           ? ""
           : " and " + std::to_string(names.size() - 1) + " more");
}

/// Names as the network itself has them: torch.nn.DataParallel puts "module."
/// before each.
inline StateDict without_prefix(const StateDict& state) {
  const std::string prefix = "module.";
  StateDict result;
  for (const auto& item : state) {
    if (item.key().compare(0, prefix.size(), prefix) != 0) {
      return state;
    }
    result.insert(item.key().substr(prefix.size()), item.value());
  }
  return result;
}

/// Files of torch 0.4.0 and before lack these counters, which nothing in these
/// networks depends on.
inline bool may_be_missing(const std::string& name) {
  const std::string ending = ".num_batches_tracked";
  return name.size() > ending.size() &&
      name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
}

/// Refuses a state dict whose entries are not those of the network.
inline void check_entries(
    const std::filesystem::path& path,
    const std::string& model,
    const StateDict& expected,
    const StateDict& found) {
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  for (const auto& name : expected.keys()) {
    if (!found.contains(name) && !may_be_missing(name)) {
      missing.push_back(name);
    }
  }
  for (const auto& name : found.keys()) {
    if (!expected.contains(name)) {
      unexpected.push_back(name);
    }
  }
  if (!missing.empty()) {
    throw support::Error(
        "expected " + path.string() + " to have all weights of " + model +
        ", but it lacks " + first_of(missing) +
        (unexpected.empty() ? "" : ", and has " + first_of(unexpected)) +
        ". Give the file of a " + model + ".");
  }
  if (!unexpected.empty()) {
    throw support::Error(
        "expected " + path.string() + " to have the weights of " + model +
        " alone, but it has " + first_of(unexpected) +
        ", too. Give the file of a " + model + ".");
  }
  for (const auto& item : found) {
    const at::Tensor& wanted = expected[item.key()];
    const at::Tensor& tensor = item.value();
    if (tensor.sizes() != wanted.sizes() ||
        tensor.is_floating_point() != wanted.is_floating_point()) {
      throw support::Error(
          "expected \"" + item.key() + "\" in " + path.string() + " to have " +
          described(wanted) + ", but got " + described(tensor) +
          ". Give the file of a " + model + " for as many classes.");
    }
  }
}

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
  const StateDict found = detail::without_prefix(read_state_dict(path));
  const StateDict state = python_state(network);
  detail::check_entries(path, model, state, found);
  const torch::NoGradGuard no_grad;
  for (const auto& item : state) {
    at::Tensor target = item.value();
    if (found.contains(item.key())) {
      target.copy_(found[item.key()]);
    } else {
      target.zero_();
    }
  }
}

/// Writes the weights of a network as a state dict of Python MemCNN's.
///
/// Throws:   Error if the file cannot be written.
inline void save_python_weights(
    const std::filesystem::path& path,
    const revnet::RevNetImpl& network) {
  write_state_dict(path, python_state(network));
}

} // namespace training
