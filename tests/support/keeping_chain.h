// SPDX-License-Identifier: MIT
#pragma once

#include "keeper.h"
#include "twins.h"

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {

/// A function of its argument and of some parameters.
struct FunctionBranchImpl final : torch::nn::Cloneable<FunctionBranchImpl> {
  using Tensors = std::vector<torch::Tensor>;
  using Function = std::function<torch::Tensor(torch::Tensor, const Tensors&)>;

  FunctionBranchImpl(Tensors initial_, Function function_)
      : initial(std::move(initial_)), function(std::move(function_)) {
    reset();
  }
  void reset() override {
    weights.clear();
    for (size_t i = 0; i < initial.size(); ++i) {
      weights.push_back(
          register_parameter("weight" + std::to_string(i), initial[i].clone()));
    }
  }
  torch::Tensor forward(torch::Tensor x) {
    return function(std::move(x), weights);
  }

  Tensors initial;
  Function function;
  Tensors weights;
};
TORCH_MODULE(FunctionBranch);

/// Additive couplings, whose branches' results are kept in some way.
class KeepingChain {
 public:
  explicit KeepingChain(
      const Branch& branch,
      size_t depth = 2,
      const memcnn::CouplingOptions& options = {}) {
    for (size_t i = 0; i < depth; ++i) {
      Coupling block(branch(), branch(), options);
      sequence->push_back(block);
      blocks_.push_back(block);
    }
  }

  torch::Tensor plain(const torch::Tensor& x) {
    const memcnn::PlainAutogradGuard plain;
    return sequence(x);
  }

  torch::Tensor run(Keeping way, Keeper& keeper, torch::Tensor x) {
    if (way == Keeping::kSequence) {
      return keeper.run(sequence.ptr(), x);
    }
    for (Coupling& block : blocks_) {
      x = keeper.run(block.ptr(), x);
    }
    return x;
  }

  /// Of the input (first) and the parameters, for a loss of the outputs.
  std::vector<torch::Tensor> gradients(
      const torch::Tensor& y,
      const torch::Tensor& x) const {
    return torch::autograd::grad({loss(y)}, sources(x));
  }

  /// What gradients are taken of: the input and all parameters.
  std::vector<torch::Tensor> sources(const torch::Tensor& x) const {
    std::vector<torch::Tensor> result = {x};
    for (const torch::Tensor& parameter : sequence->parameters()) {
      result.push_back(parameter);
    }
    return result;
  }

  static torch::Tensor loss(const torch::Tensor& y) {
    return y.to(torch::kDouble).square().sum();
  }

  memcnn::ReversibleSequence sequence{memcnn::ReversibleSequenceOptions()};

 private:
  std::vector<Coupling> blocks_;
};

} // namespace memcnn_test
