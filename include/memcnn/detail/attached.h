// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The values of some tensors in the graph of others: each is attached to where
/// its true one came from, by a gate that is closed until open().
///
/// A nested backward pass ends at a closed gate. It would otherwise run what
/// lies beyond as far as it leads to the same parameters, as it does where two
/// blocks share their weights; and so would the outer pass, once more.
class Attached {
 public:
  /// The i-th tensor is attached to where the node's i-th input came from.
  Attached(const Tensors& values, const torch::autograd::Node& node) {
    for (size_t i = 0; i < values.size(); ++i) {
      tensors_.push_back(values[i].detach());
      torch::autograd::Edge edge = node.next_edge(i);
      if (edge.is_valid()) {
        auto gate = make_node<torch::autograd::Identity>();
        gate->add_next_edge(edge); // first: what is beyond has its rank
        gate->next_edges()[0] = torch::autograd::Edge();
        torch::autograd::set_history(tensors_.back(), gate);
        gates_.emplace_back(std::move(gate), std::move(edge));
      }
    }
  }

  const Tensors& tensors() const {
    return tensors_;
  }

  /// From now on gradients pass.
  void open() {
    for (auto& [gate, edge] : gates_) {
      gate->next_edges()[0] = edge;
    }
  }

 private:
  using Gate = std::pair<NodePtr, torch::autograd::Edge>;

  Tensors tensors_;
  std::vector<Gate> gates_;
};

} // namespace memcnn::detail
