// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/gradient.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/parameter_gradients.h>

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The tensors as arguments of a local run: cut off from what made them, and
/// leaves where a gradient is wanted.
inline Tensors cut_off(Tensors tensors, const std::vector<bool>& needs_grad) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = detached(tensors[i]);
    if (needs_grad[i]) {
      tensors[i].requires_grad_();
    }
  }
  return tensors;
}

/// A run of a module with a graph of its own, from its arguments to its
/// outputs: what every backward step differentiates.
class LocalRun {
 public:
  /// needs_grad: one an argument.
  LocalRun(
      const torch::nn::Module& module,
      Tensors arguments_,
      std::vector<bool> needs_grad,
      ParameterGradients& parameters)
      : arguments(std::move(arguments_)),
        module_(module),
        needs_grad_(std::move(needs_grad)),
        parameters_(parameters),
        wanted_(parameters.wanted(module)) {}

  /// Whether it needs a graph at all.
  bool needs_graph() const {
    return !wanted_.empty() ||
        std::find(needs_grad_.begin(), needs_grad_.end(), true) !=
        needs_grad_.end();
  }

  /// The gradients of the arguments, undefined where not wanted; those of the
  /// module's parameters are added to the sums. The outputs are given up.
  Tensors gradients(Tensors grad_outputs, GraphUse use = GraphUse::kFree) {
    Ends ends = ends_of(outputs, arguments, module_);
    Tensors leaves;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (needs_grad_[i]) {
        leaves.push_back(arguments[i]);
      }
    }
    Tensors found = local_gradient(
        std::move(outputs),
        std::move(grad_outputs),
        leaves,
        wanted_,
        std::move(ends),
        use);

    Tensors grad_arguments;
    auto next = found.begin();
    for (const bool needed : needs_grad_) {
      grad_arguments.push_back(needed ? std::move(*next++) : at::Tensor());
    }
    for (const at::Tensor& parameter : wanted_) {
      parameters_.add(parameter, std::move(*next++));
    }
    return grad_arguments;
  }

  Tensors arguments;
  Tensors outputs; // whoever runs the module sets them

 private:
  const torch::nn::Module& module_;
  std::vector<bool> needs_grad_;
  ParameterGradients& parameters_;
  Tensors wanted_;
};

} // namespace memcnn::detail
