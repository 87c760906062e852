// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/chain_nodes.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/detail/saved.h>
#include <memcnn/detail/streams.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// Stops where derivatives are taken in another way than by a backward pass,
/// which LibTorch's own functions in C++ do not know either.
inline void check_mode(const std::string& place, const at::Tensor& tensor) {
  TORCH_CHECK(
      !torch::autograd::isFwGradDefined(tensor),
      place,
      ": expected tensors without a tangent of forward-mode differentiation, "
      "but got one with it (",
      describe(tensor),
      "). Run the plain modules, under memcnn::PlainAutogradGuard.");
}

inline void check_no_transform() {
  if (const auto& transforms = at::functorch::functorchTLSAccessor()) {
    transforms->checkSupportsCppAutogradFunction();
  }
}

/// Builds the nodes of a chain while it runs (Note [Nodes of a chain]): what
/// travels comes from the node that was built last.
class ChainGraph {
 public:
  /// place: who runs, "ReversibleSequence::forward()".
  ChainGraph(
      std::string place,
      Direction direction,
      RecordingOptions options,
      const at::Tensor& input)
      : place_(std::move(place)), direction_(direction), options_(options) {
    check_no_transform();
    check_mode(place_, input);
    edges_.push_back(
        input.requires_grad() ? torch::autograd::impl::gradient_edge(input)
                              : torch::autograd::Edge());
  }

  /// The next block takes these, in that form; what travelled had another one,
  /// or the same.
  void take(
      std::optional<int64_t> split_dim_before,
      const Streams& form,
      const Tensors& inputs) {
    if (!edges_.front().is_valid()) {
      edges_.assign(inputs.size(), torch::autograd::Edge());
    } else if (split_dim_before != form.split_dim()) {
      auto node = make_node<FormNode>(split_dim_before, form.form(), front_);
      if (front_ != nullptr) {
        front_ = node.get();
      }
      add_node(node, {}, inputs);
    }
    for (const at::Tensor& input : inputs) {
      const bool keep = blocks_.empty() && !is_differentiable(input);
      kept_inputs_.push_back(keep ? Saved(detached(input)) : Saved());
    }
  }

  /// The i-th block took them, and returned these.
  void add(
      size_t i,
      const std::shared_ptr<Invertible>& block,
      const RunExtras& extras,
      const Tensors& outputs) {
    for (const at::Tensor& output : outputs) {
      check_returned(place_, output);
    }
    auto node = make_node<BlockNode>(
        NodeState(place_, block, direction_, /*keep_inputs=*/false, options_),
        i,
        front_,
        turns_);
    node->state().inputs = std::exchange(kept_inputs_, {});
    node->state().conditions = saved_conditions(extras.conditions);
    const Tensors parameters = trained_parameters(block->module());
    for (const at::Tensor& parameter : parameters) {
      check_mode(place_, parameter);
      node->state().parameters.emplace_back(parameter);
    }
    blocks_.push_back(node.get());
    front_ = node.get();
    add_node(node, joined(extras.conditions.vec(), parameters), outputs);
    if (extras.log_det != nullptr) {
      node->state().has_log_det = true;
      log_det_edges_.emplace_back(
          node, node->add_input_metadata(extras.log_det->so_far()));
    }
  }

  /// All blocks have run. Returns their output, and the log-determinant if there
  /// is one, as part of the graph. `form` is what the last of them returned.
  WithLogDet end(
      const at::Tensor& whole,
      at::Tensor log_det,
      Streams form,
      Recording& recording) {
    at::Tensor output = detached(whole);
    const at::Device device = compute_device_of(output);
    const CaptureId capture = capture_of(device);
    recording.replay_from_here();
    for (BlockNode* block : blocks_) {
      NodeState& state = block->state();
      state.recording = std::move(recording.block(block->index()));
      state.device = device;
      state.capture = capture;
    }
    NodeState state(
        place_, /*block=*/nullptr, direction_, /*keep_inputs=*/false, options_);
    state.device = device;
    state.capture = capture;
    // An alias without a graph: an output that its own node referred to would
    // never die.
    state.outputs.emplace_back(detached(output));
    if (is_differentiable(output)) {
      auto node = make_node<OutputNode>(std::move(state), std::move(form));
      torch::autograd::edge_list edges = all_edges({});
      const bool has_log_det = !log_det_edges_.empty();
      std::move(
          log_det_edges_.begin(),
          log_det_edges_.end(),
          std::back_inserter(edges));
      node->set_next_edges(std::move(edges));
      torch::autograd::set_history(output, node);
      if (has_log_det) {
        torch::autograd::set_history(log_det, node);
      }
    }
    return {std::move(output), std::move(log_det)};
  }

 private:
  /// From what travelled until now, and other tensors, to what travels from now
  /// on.
  template <class Node>
  void
  add_node(const Node& node, const Tensors& others, const Tensors& results) {
    node->set_next_edges(all_edges(others));
    for (torch::autograd::edge_list* edges : {&edges_, &value_edges_}) {
      for (const at::Tensor& result : results) {
        edges->emplace_back(node, node->add_input_metadata(result));
      }
    }
  }

  /// Those of the next node, given away.
  torch::autograd::edge_list all_edges(const Tensors& others) {
    torch::autograd::edge_list edges = std::exchange(edges_, {});
    for (const at::Tensor& other : others) {
      edges.push_back(
          other.requires_grad() ? torch::autograd::impl::gradient_edge(other)
                                : torch::autograd::Edge());
    }
    std::move(
        value_edges_.begin(), value_edges_.end(), std::back_inserter(edges));
    value_edges_.clear();
    return edges;
  }

  std::string place_;
  Direction direction_;
  RecordingOptions options_;
  std::shared_ptr<std::mutex> turns_ = std::make_shared<std::mutex>();
  torch::autograd::edge_list edges_; // of the gradients of what travels
  torch::autograd::edge_list value_edges_; // of what travels itself
  torch::autograd::edge_list log_det_edges_; // of all blocks that have one
  std::vector<Saved> kept_inputs_; // of the next block
  ChainNode* front_ = nullptr; // of the next one that wants values
  std::vector<BlockNode*> blocks_; // the graph holds them
};

} // namespace memcnn::detail
