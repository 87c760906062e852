// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/ownership.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <c10/util/flat_hash_map.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {

/// The tensors, each once, in the order in which they come first.
inline Tensors each_once(Tensors tensors) {
  std::vector<const at::TensorImpl*> sorted;
  sorted.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    sorted.push_back(tensor.unsafeGetTensorImpl());
  }
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()) {
    return tensors; // nearly always
  }
  ska::flat_hash_set<const at::TensorImpl*> seen;
  tensors.erase(
      std::remove_if(
          tensors.begin(),
          tensors.end(),
          [&](const at::Tensor& tensor) {
            return !seen.insert(tensor.unsafeGetTensorImpl()).second;
          }),
      tensors.end());
  return tensors;
}

/// The parameters of a module that take part in training, each once: a module
/// or parameter that is registered twice appears twice in parameters().
inline Tensors trained_parameters(const torch::nn::Module& module) {
  Tensors trained;
  for_each_parameter(module, [&](const at::Tensor& parameter) {
    if (parameter.requires_grad()) {
      trained.push_back(parameter);
    }
  });
  return each_once(std::move(trained));
}

} // namespace detail

/// The gradients of the parameters of one backward pass: which are wanted, and
/// their sums so far. A parameter that several branches share gets them all.
class ParameterGradients {
 public:
  /// wanted: one an entry of parameters.
  ParameterGradients(
      const std::vector<at::Tensor>& parameters,
      const std::vector<bool>& wanted)
      : slots_(parameters.size()), sums_(parameters.size()) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (wanted[i]) {
        slots_.emplace(parameters[i].unsafeGetTensorImpl(), i);
      }
    }
  }

  /// Those parameters of a module whose gradients are wanted.
  std::vector<at::Tensor> wanted(const torch::nn::Module& module) const {
    std::vector<at::Tensor> result;
    for (at::Tensor& parameter : detail::trained_parameters(module)) {
      if (slots_.count(parameter.unsafeGetTensorImpl()) != 0) {
        result.push_back(std::move(parameter));
      }
    }
    return result;
  }

  /// Adds to the gradient of a parameter out of wanted(); an undefined tensor
  /// adds nothing.
  void add(const at::Tensor& parameter, at::Tensor gradient) {
    if (gradient.defined()) {
      // Where a parameter is added to a half as it is, its gradient is that of
      // the half, which the backward step goes on to update in place.
      if (!detail::is_its_own(gradient)) {
        gradient = gradient.clone();
      }
      at::Tensor& sum = sums_[slots_.at(parameter.unsafeGetTensorImpl())];
      sum = sum.defined() ? added(sum, gradient) : std::move(gradient);
    }
  }

  /// The sums, given away, in the order of the constructor's parameters;
  /// undefined where nothing was added.
  std::vector<at::Tensor> take() {
    return std::move(sums_);
  }

 private:
  /// A sparse tensor can be added to a dense one, not the other way round.
  static at::Tensor added(const at::Tensor& a, const at::Tensor& b) {
    return a.is_sparse() ? b + a : a + b;
  }

  ska::flat_hash_map<const at::TensorImpl*, size_t> slots_;
  std::vector<at::Tensor> sums_;
};

} // namespace memcnn
