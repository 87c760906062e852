// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/chain_block.h>
#include <memcnn/detail/graph_node.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/detail/streams.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Nodes of a chain]
// ~~~~~~~~~~~~~~~~~~~~~~~
// A ReversibleSequence that the caller's graph is recorded through becomes
//
//   input <- (form) <- block 0 <- block 1 <- ... <- (form) <- output
//
// where every block is a node of its own, a function of what the block before it
// returned and of its own parameters.
//
// 1. No tensor between two blocks exists after forward. The output's node alone
//    keeps one, the output, and begins a pass with it. The values that blocks
//    rebuild from it travel beside the graph, each pass having its own; their
//    gradients travel on the graph's edges, moved from node to node, so that
//    blocks may update both in place.
// 2. The engine runs what accumulates a parameter's gradient before any other
//    node that is ready: the gradients of a block have arrived, and their hooks
//    have fired, before the block in front of it runs again. A parameter of
//    several blocks gets the sum, once.
// 3. A pass goes only as far back as somebody asks for, and a chain begins at
//    the first block that has something to learn.
// 4. Where gradients have a graph themselves (create_graph) later passes enter
//    in the middle of the chain. Every block then keeps its values until the
//    graph is let go: as much memory as the plain modules take.
// 5. A block inside of another module that runs as one node (a sequence in a
//    wrapper) is none: the outer node asks for its backward_step().

/// The values that the nodes of one run hand from one to the next, beside the
/// graph.
class TravellingValues {
 public:
  /// To the node that runs next in the present pass.
  void hand_over(Streams values) {
    const std::lock_guard lock(mutex_);
    passes_.emplace_back(this_pass(), std::move(values));
  }

  /// What was handed over in the present pass; nothing if it began further
  /// down.
  std::optional<Streams> take() {
    const std::lock_guard lock(mutex_);
    const auto found =
        std::find_if(passes_.begin(), passes_.end(), [](const auto& pass) {
          return pass.first == this_pass();
        });
    if (found == passes_.end()) {
      return std::nullopt;
    }
    std::optional<Streams> values = std::move(found->second);
    passes_.erase(found);
    return values;
  }

 private:
  static int this_pass() {
    return torch::autograd::get_current_graph_task_id();
  }

  std::mutex mutex_; // several threads may run passes over one graph
  std::vector<std::pair<int, Streams>> passes_;
};

/// What is true of every node of a chain.
class ChainNode : public torch::autograd::Node {
 protected:
  /// Gives a missing gradient of one half, where that of the other one came: a
  /// pass through second derivatives may bring one alone.
  void complete(Tensors& gradients) const {
    if (all_defined(gradients) || none_defined(gradients)) {
      return;
    }
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!gradients[i].defined()) {
        gradients[i] = input_metadata(i).zeros_like();
      }
    }
  }
};

/// Between what a block returned and what the next one takes: halves that are
/// joined, or a whole that is split.
class FormNode final : public ChainNode {
 public:
  /// From the form `before`, the halves of a dimension or one whole.
  FormNode(std::optional<int64_t> before, Streams after)
      : before_(before), after_(std::move(after)) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(halves)";
  }

 private:
  Tensors apply(Tensors&& gradients) override {
    complete(gradients);
    Streams streams = after_;
    streams.set(std::move(gradients));
    return streams.take_in(before_, "ReversibleSequence::backward()");
  }

  std::optional<int64_t> before_;
  Streams after_; // its form alone
};

/// One block of a chain: a function of what the block before it returned and of
/// its own parameters.
class BlockNode final : public ChainNode {
 public:
  BlockNode(
      NodeState state,
      size_t index,
      bool is_first,
      std::shared_ptr<TravellingValues> values)
      : state_(std::move(state)),
        index_(index),
        is_first_(is_first),
        values_(std::move(values)) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(block " + std::to_string(index_) + ", " +
        state_.block->type_name() + ")";
  }

  NodeState& state() {
    return state_;
  }
  size_t index() const {
    return index_;
  }

 private:
  Tensors apply(Tensors&& grad_outputs) override {
    const std::lock_guard lock(mutex_); // as LibTorch's own nodes do
    check(state_);
    state_.released = !is_graph_retained(); // even if this pass fails
    complete(grad_outputs);
    Streams values = values_of_pass();
    const size_t trained = state_.parameters.size();
    const size_t inputs = num_outputs() - trained;
    ParameterGradients parameters(
        tensors_of(state_.parameters), wanted_of(*this, inputs, trained));
    AfterRun after;
    after.outputs = values.take_for(*state_.block);
    after.grad_outputs = std::move(grad_outputs);
    after.kept_inputs.resize(inputs);
    after.needs_grad = wanted_of(*this, 0, inputs);
    after.retain_graph = is_graph_retained();
    const bool goes_on = after.needs_grad[0] && !is_first_;

    BeforeRun before = step(std::move(after), parameters);
    if (goes_on) {
      values.set(std::move(before.inputs));
      values_->hand_over(std::move(values));
    }
    Tensors gradients = std::move(before.grad_inputs);
    for (at::Tensor& gradient : parameters.take()) {
      gradients.push_back(std::move(gradient));
    }
    if (!is_graph_retained()) {
      let_go();
    }
    return gradients;
  }

  /// The block's outputs, from the node behind it, or from an earlier pass
  /// (Note [Nodes of a chain], rule 4).
  Streams values_of_pass() {
    std::optional<Streams> values = values_->take();
    if (!values) {
      values = kept_;
    }
    TORCH_INTERNAL_ASSERT(values.has_value()); // no pass begins elsewhere
    if (at::GradMode::is_enabled()) {
      kept_ = values;
    }
    return *std::move(values);
  }

  BeforeRun step(AfterRun after, ParameterGradients& parameters) {
    if (at::GradMode::is_enabled()) {
      return at_block_in_backward(index_, *state_.block, [&] {
        return DifferentiableStep::back(state_, std::move(after), parameters);
      });
    }
    return block_step_back(
        index_,
        *state_.block,
        state_.direction,
        std::move(after),
        state_.recording,
        parameters);
  }

  void let_go() {
    release(state_);
    kept_.reset();
    values_.reset();
  }

  NodeState state_;
  size_t index_;
  bool is_first_; // of those that learn: nobody rebuilds what is before it
  std::shared_ptr<TravellingValues> values_;
  std::optional<Streams> kept_;
};

/// The end of a chain: keeps its output, and begins every pass with it.
class OutputNode final : public ChainNode {
 public:
  /// `form` is what the last block returned, its tensors apart.
  OutputNode(
      NodeState state,
      Streams form,
      std::shared_ptr<TravellingValues> values)
      : state_(std::move(state)),
        form_(std::move(form)),
        values_(std::move(values)) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(ReversibleSequence)";
  }

  const NodeState& state() const {
    return state_;
  }

 private:
  Tensors apply(Tensors&& grad_outputs) override {
    const std::lock_guard lock(mutex_);
    check(state_);
    const auto split_dim = form_.split_dim();
    const std::string& taker = state_.place;
    Streams values = form_.whole(take_outputs(state_)[0]);
    Streams gradients = form_.whole(std::move(grad_outputs[0]));
    values_->hand_over(std::move(values));
    if (!is_graph_retained()) {
      values_.reset();
      release(state_);
    }
    return gradients.take_in(split_dim, taker);
  }

  NodeState state_;
  Streams form_;
  std::shared_ptr<TravellingValues> values_;
};

} // namespace memcnn::detail
