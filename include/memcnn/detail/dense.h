// SPDX-License-Identifier: MIT
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>

namespace memcnn::detail {

/// The tensor without gaps, in the memory format that it is nearest to: a copy
/// where it has gaps, as half of the channels of a larger tensor has. Kernels
/// are several times slower on those.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.contiguous(tensor.suggest_memory_format());
}

/// Passes a tensor on; what comes back as its gradient is dense and in its
/// memory format.
struct DenseGradient : torch::autograd::Function<DenseGradient> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& tensor) {
    context->saved_data["format"] =
        static_cast<int64_t>(tensor.suggest_memory_format());
    return tensor.view_as(tensor);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      const torch::autograd::variable_list& gradients) {
    const auto format =
        static_cast<at::MemoryFormat>(context->saved_data.at("format").toInt());
    return {gradients[0].contiguous(format)};
  }
};

/// The tensor, with a gradient in its own memory format where a graph is
/// recorded. Gradients of its parts otherwise come back as a contiguous one.
inline at::Tensor with_dense_gradient(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad() &&
          tensor.suggest_memory_format() != at::MemoryFormat::Contiguous
      ? DenseGradient::apply(tensor)
      : tensor;
}

} // namespace memcnn::detail
