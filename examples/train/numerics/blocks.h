// SPDX-License-Identifier: MIT
#pragma once

#include "revnet/resnet.h"
#include "revnet/revnet.h"

#include <memcnn/memcnn.h>

#include <torch/nn.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace training {

/// A map from one tensor to another.
using TensorMap = std::function<torch::Tensor(const torch::Tensor&)>;

/// What a network runs as a whole between two tensors: its stem, its head, and
/// every residual block.
///
/// The path is the one that its parameters' names begin with, and its last
/// number the one that a memcnn::ReversibleSequence has in its errors.
struct NamedBlock {
  std::string path; // "trunk.1.blocks.0"
  std::string type; // "AdditiveCoupling"; empty where the path says it
  TensorMap forward; // ordinary autograd

  // Of reversible blocks only; empty elsewhere.
  std::string run; // path of the chain that is rebuilt as a whole
  TensorMap rounded_input; // what it takes its input for, and gives back
  TensorMap forward_with_kept_input; // keeps the input, and nothing else
  TensorMap inverse;

  bool is_reversible() const {
    return static_cast<bool>(inverse);
  }
  std::string name() const {
    return type.empty() ? path : path + " (" + type + ")";
  }
};

namespace detail {

/// A block that a module holder runs, wherever its weights come from.
template <class Holder>
NamedBlock
plain_block(std::string path, std::string type, const Holder& module) {
  NamedBlock block;
  block.path = std::move(path);
  block.type = std::move(type);
  block.forward = [module = module.ptr()](const torch::Tensor& x) {
    return module->forward(x);
  };
  return block;
}

inline NamedBlock reversible_block(
    std::string path,
    std::string run,
    const revnet::ReversibleRunImpl::Coupling& coupling) {
  auto block = plain_block(std::move(path), "AdditiveCoupling", coupling);
  block.run = std::move(run);
  block.rounded_input = [coupling](const torch::Tensor& x) {
    const auto bits = coupling->options.fractional_bits();
    if (!bits) {
      return x;
    }
    const double scale = std::ldexp(1.0, static_cast<int>(*bits));
    return x.mul(scale).round_().div_(scale);
  };
  block.forward_with_kept_input = [coupling](const torch::Tensor& x) {
    return memcnn::checkpoint(coupling, x);
  };
  block.inverse = [module = coupling.ptr()](const torch::Tensor& y) {
    return module->inverse(y);
  };
  return block;
}

inline void append_run(
    const std::string& path,
    const revnet::ReversibleRunImpl& run,
    std::vector<NamedBlock>& blocks) {
  using Coupling = revnet::ReversibleRunImpl::Coupling;
  for (const auto& child : run.blocks->named_children()) {
    blocks.push_back(reversible_block(
        path + ".blocks." + child.key(),
        path,
        Coupling(std::dynamic_pointer_cast<Coupling::Impl>(child.value()))));
  }
}

inline void append_trunk(
    const torch::nn::Sequential& trunk,
    std::vector<NamedBlock>& blocks) {
  for (const auto& child : trunk->named_children()) {
    const std::string path = "trunk." + child.key();
    const auto& module = child.value();
    if (auto run =
            std::dynamic_pointer_cast<revnet::ReversibleRunImpl>(module)) {
      append_run(path, *run, blocks);
    } else if (
        auto change =
            std::dynamic_pointer_cast<revnet::TransitionImpl>(module)) {
      blocks.push_back(
          plain_block(path, "Transition", revnet::Transition(change)));
    } else {
      blocks.push_back(plain_block(
          path,
          "Block",
          resnet::Block(std::dynamic_pointer_cast<resnet::BlockImpl>(module))));
    }
  }
}

template <class Network>
std::vector<NamedBlock> blocks_from_stem_to_head(Network& network) {
  std::vector<NamedBlock> blocks{plain_block("stem", "", network.stem)};
  append_trunk(network.trunk, blocks);
  blocks.push_back(plain_block("head", "", network.head));
  return blocks;
}

} // namespace detail

/// The blocks of a revnet::RevNet or resnet::ResNet in the order in which they
/// run. They share its weights; run one after the other, they are the network.
inline std::vector<NamedBlock> blocks_of(torch::nn::Module& network) {
  if (auto* revnet = dynamic_cast<revnet::RevNetImpl*>(&network)) {
    return detail::blocks_from_stem_to_head(*revnet);
  }
  return detail::blocks_from_stem_to_head(
      dynamic_cast<resnet::ResNetImpl&>(network));
}

} // namespace training
