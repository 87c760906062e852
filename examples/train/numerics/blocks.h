// SPDX-License-Identifier: MIT
#pragma once

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

/// A block of ordinary autograd, by its weights' path.
template <class Module>
NamedBlock plain_block(
    std::string path,
    std::string type,
    std::shared_ptr<Module> module) {
  NamedBlock block;
  block.path = std::move(path);
  block.type = std::move(type);
  block.forward = [module = std::move(module)](const torch::Tensor& x) {
    return module->forward(x);
  };
  return block;
}

using Coupling = revnet::ReversibleBlocksImpl::Coupling;

inline NamedBlock
reversible_block(std::string path, std::string run, const Coupling& coupling) {
  auto block = plain_block(std::move(path), "AdditiveCoupling", coupling.ptr());
  block.run = std::move(run);
  block.rounded_input = [coupling](const torch::Tensor& x) {
    const auto bits = coupling->options().fractional_bits();
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

inline void append_trunk(
    const torch::nn::Sequential& trunk,
    std::vector<NamedBlock>& blocks) {
  for (const auto& child : trunk->named_children()) {
    const std::string path = "trunk." + child.key();
    if (auto residual = std::dynamic_pointer_cast<revnet::ResidualBlockImpl>(
            child.value())) {
      blocks.push_back(plain_block(path, "ResidualBlock", residual));
      continue;
    }
    const auto& run =
        dynamic_cast<const revnet::ReversibleBlocksImpl&>(*child.value());
    for (const auto& block : run.blocks->named_children()) {
      blocks.push_back(reversible_block(
          path + ".blocks." + block.key(),
          path,
          Coupling(std::dynamic_pointer_cast<Coupling::Impl>(block.value()))));
    }
  }
}

} // namespace detail

/// The blocks of a network in the order in which they run. They share its
/// weights; run one after the other, they are the network.
inline std::vector<NamedBlock> blocks_of(const revnet::RevNetImpl& network) {
  std::vector<NamedBlock> blocks{
      detail::plain_block("stem", "", network.stem.ptr())};
  detail::append_trunk(network.trunk, blocks);
  blocks.push_back(detail::plain_block("head", "", network.head.ptr()));
  return blocks;
}

} // namespace training
