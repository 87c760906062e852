// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace memcnn::detail {

/// What holds a node of autograd's graph: a shared_ptr in LibTorch 2.11, an
/// intrusive_ptr in 2.15.
using NodePtr = decltype(torch::autograd::Edge::function);

/// A node of class N, held as LibTorch holds its own: a chain of any length is
/// dropped without a call within a call.
template <class N, class... Args>
auto make_node(Args&&... args) {
  using Shared = std::shared_ptr<torch::autograd::Node>;
  if constexpr (std::is_same_v<NodePtr, Shared>) {
    return std::shared_ptr<N>(new N(std::forward<Args>(args)...), [](N* node) {
      deleteNode(node); // LibTorch's, where there is one
    });
  } else {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
}

} // namespace memcnn::detail
