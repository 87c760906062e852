// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/tensors.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Where a size is 1 its stride means nothing, and several layouts are one. But
// kernels tell them apart: they choose by strides in which order they go, draw
// random numbers and add.

/// Whether a tensor has its numbers where these strides say.
inline bool is_placed_by(const at::Tensor& tensor, at::IntArrayRef strides) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != 1 &&
        tensor.stride(dim) != strides[static_cast<size_t>(dim)]) {
      return false;
    }
  }
  return true;
}

/// A copy with these strides.
inline at::Tensor copy_by(const at::Tensor& tensor, at::IntArrayRef strides) {
  // Where the strides have one number for several entries (expand()), the copy
  // has it, too.
  at::Tensor numbers = tensor;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (strides[static_cast<size_t>(dim)] == 0 && tensor.size(dim) > 1) {
      numbers = numbers.narrow(dim, 0, 1);
    }
  }
  return at::empty_strided(numbers.sizes(), strides, tensor.options())
      .copy_(numbers)
      .as_strided(tensor.sizes(), strides);
}

/// The tensor with these strides, in its own memory where that is possible.
inline at::Tensor with_strides(
    const at::Tensor& tensor,
    at::IntArrayRef strides) {
  if (tensor.strides() == strides) {
    return tensor;
  }
  return is_placed_by(tensor, strides)
      ? tensor.as_strided(tensor.sizes(), strides)
      : copy_by(tensor, strides);
}

/// The strides that a gradient of the tensor has to have: its own, without gaps.
inline std::vector<int64_t> dense_strides(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense()
      ? tensor.strides().vec()
      : at::empty_like(tensor, tensor.options().device(at::kMeta))
            .strides()
            .vec();
}

/// In backward: the gradient of what was made of a tensor is the tensor's, laid
/// out as the tensor is.
///
/// A Node, not a Function, whose templates every program would compile for each
/// kind of argument.
class GradientLaidOut final : public torch::autograd::Node {
 public:
  explicit GradientLaidOut(const at::Tensor& tensor)
      : Node(torch::autograd::collect_next_edges(tensor)),
        strides_(dense_strides(tensor)) {}

 private:
  Tensors apply(Tensors&& gradients) override {
    if (gradients[0].defined()) {
      gradients[0] = with_strides(gradients[0], strides_);
    }
    return std::move(gradients);
  }

  std::vector<int64_t> strides_;
};

/// What was made of the tensor where no graph is recorded, with its place in
/// the tensor's graph.
inline at::Tensor with_gradient_of(const at::Tensor& tensor, at::Tensor made) {
  if (at::GradMode::is_enabled() && tensor.requires_grad()) {
    torch::autograd::set_history(made, make_node<GradientLaidOut>(tensor));
  }
  return made;
}

/// The tensor with these strides and a gradient laid out as the tensor.
inline at::Tensor laid_out_by(
    const at::Tensor& tensor,
    at::IntArrayRef strides) {
  at::Tensor made;
  {
    const at::NoGradGuard without_graph;
    // No view_as(): that chooses strides of its own where sizes are 1.
    made = at::alias(with_strides(tensor, strides));
  }
  return with_gradient_of(tensor, std::move(made));
}

/// The tensor, with a gradient laid out as itself where a graph is recorded.
/// Gradients of its parts otherwise come back as a contiguous one.
inline at::Tensor with_dense_gradient(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad() &&
          tensor.suggest_memory_format() != at::MemoryFormat::Contiguous
      ? laid_out_by(tensor, tensor.strides())
      : tensor;
}

/// The tensor, laid out as another one of its sizes.
inline at::Tensor laid_out_as(const at::Tensor& like, at::Tensor tensor) {
  return like.layout() != at::kStrided || tensor.layout() != at::kStrided ||
          tensor.strides() == like.strides()
      ? std::move(tensor)
      : laid_out_by(tensor, like.strides());
}

/// Whether one number stands for several entries, as after expand().
inline bool is_expanded(const at::Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.stride(dim) == 0 && tensor.size(dim) > 1) {
      return true;
    }
  }
  return false;
}

/// Gradients of some tensors, laid out as these: not every kernel means the same
/// by a gradient laid out otherwise. What is undefined stays so, and what is one
/// number for several entries.
inline Tensors laid_out_as(const Tensors& like, Tensors gradients) {
  for (size_t i = 0; i < like.size(); ++i) {
    if (gradients[i].defined() && !is_expanded(gradients[i])) {
      gradients[i] = with_strides(gradients[i], dense_strides(like[i]));
    }
  }
  return gradients;
}

/// A tensor that a graph goes on to combine with `other`, whose layout the
/// result takes: its gradient comes back in its own.
inline at::Tensor beside(const at::Tensor& other, const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad() &&
          tensor.layout() == at::kStrided && tensor.strides() != other.strides()
      ? laid_out_by(tensor, tensor.strides())
      : tensor;
}

/// Lays the arguments of a second run out as those of the first were
/// (Note [Recomputation], rule 9).
inline void lay_out(Tensors& tensors, const std::vector<TensorMeta>& first) {
  TORCH_CHECK(
      tensors.size() == first.size(),
      "memcnn: expected a branch to take ",
      first.size(),
      " tensors in backward, as in forward, but got ",
      tensors.size(),
      ". Let Recording::run() have the same arguments in both directions.");
  for (size_t i = 0; i < tensors.size(); ++i) {
    at::Tensor& tensor = tensors[i];
    TORCH_CHECK(
        first[i].fits(tensor),
        "memcnn: expected a branch to take in backward what it took in "
        "forward, ",
        describe(first[i]),
        ", but got ",
        describe(tensor),
        ". Let Recording::run() have the same arguments in both directions.");
    if (tensor.layout() == at::kStrided &&
        tensor.strides() != at::IntArrayRef(first[i].strides)) {
      tensor = laid_out_by(tensor, at::IntArrayRef(first[i].strides));
    }
  }
}

} // namespace memcnn::detail
