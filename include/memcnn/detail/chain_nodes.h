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

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
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
//    rebuild from it travel on the graph's edges beside their gradients: a pass
//    owns both, moves them from node to node, so that blocks may update them in
//    place, and loses both where it fails. Passes of several threads take turns,
//    a block each: they replay the same generators and modules.
// 2. The engine runs what accumulates a parameter's gradient before any other
//    node that is ready: the gradients of a block have arrived, and their hooks
//    have fired, before the block in front of it runs again. A parameter of
//    several blocks gets the sum, once.
// 3. A pass goes only as far back as somebody asks for, and a chain begins at
//    the first block that has something to learn.
// 4. Where gradients have a graph themselves (create_graph) later passes enter
//    in the middle of the chain, also in front of all that the first pass ran.
//    Every block that runs leaves the values in front of it there until the
//    graph is let go: as much memory as the plain modules take.
// 5. A block inside of another module that runs as one node (a sequence in a
//    wrapper) is none: the outer node asks for its backward_step().

// Note [Flows]
// ~~~~~~~~~~~~
// What a run of invertible modules does beside mapping its inputs.
//
// 1. The log-determinant is a second result of the last node, N numbers whatever
//    the depth. It is no stream: the node hands its gradient, a number for each
//    sample, to every block that has one, by an edge each.
// 2. Backward does not need it, so that it is not saved, and may be written in
//    place.
// 3. Who does not ask for it does not pay for it: not an operator more.
// 4. Conditions are inputs of each block that takes them. They have no inverse,
//    are kept as they are, without a copy, and may not change before backward;
//    their gradients are the sum over all blocks.
// 5. An anchor (anchor_every) is what a block returned, kept by its node: a pass
//    goes on from there with the true values instead of those that it rebuilt.

/// What is true of every node of a chain.
class ChainNode : public torch::autograd::Node {
 public:
  /// Notes values that the node behind it would have returned, for passes that
  /// do not come from there (Note [Nodes of a chain], rule 4).
  virtual void keep(Tensors values) = 0;

 protected:
  /// What comes from the node behind.
  struct Arrived {
    Tensors gradients;
    Tensors values; // as many; undefined if the pass began here
    at::Tensor grad_log_det; // of a block that was asked for one
  };

  Arrived arrived(Tensors&& inputs) const {
    Arrived arrived;
    if (inputs.size() % 2 != 0) {
      arrived.grad_log_det = std::move(inputs.back());
      inputs.pop_back();
    }
    arrived.values = split_off(inputs, inputs.size() / 2);
    arrived.gradients = std::move(inputs);
    complete(arrived.gradients);
    return arrived;
  }

 private:
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

inline void append(Tensors& tensors, Tensors others) {
  std::move(others.begin(), others.end(), std::back_inserter(tensors));
}

/// Between what a block returned and what the next one takes: halves that are
/// joined, or a whole that is split.
class FormNode final : public ChainNode {
 public:
  /// From the form `before`, the halves of a dimension or one whole. front: the
  /// node there; null where values are not wanted.
  FormNode(std::optional<int64_t> before, Streams after, ChainNode* front)
      : before_(before), after_(std::move(after)), front_(front) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(halves)";
  }

  void keep(Tensors values) override {
    front_->keep(in_form_before(std::move(values)));
  }

 private:
  Tensors apply(Tensors&& inputs) override {
    Arrived after = arrived(std::move(inputs));
    Tensors results = in_form_before(std::move(after.gradients));
    if (front_ != nullptr) {
      append(results, in_form_before(std::move(after.values)));
    }
    return results;
  }

  Tensors in_form_before(Tensors tensors) const {
    Streams streams = after_;
    streams.set(std::move(tensors));
    return streams.take_in(before_, "ReversibleSequence::backward()");
  }

  std::optional<int64_t> before_;
  Streams after_; // its form alone
  ChainNode* front_; // an edge holds it
};

/// One block of a chain: a function of what the block before it returned and of
/// its own parameters.
class BlockNode final : public ChainNode {
 public:
  /// front: the node that wants to know the block's inputs; null if none does.
  /// turns: of all blocks of the chain.
  BlockNode(
      NodeState state,
      size_t index,
      ChainNode* front,
      std::shared_ptr<std::mutex> turns)
      : state_(std::move(state)),
        index_(index),
        front_(front),
        turns_(std::move(turns)) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(block " + std::to_string(index_) + ", " +
        state_.block->type_name() + ")";
  }

  void keep(Tensors values) override {
    kept_ = std::move(values);
  }

  NodeState& state() {
    return state_;
  }
  size_t index() const {
    return index_;
  }

 private:
  Tensors apply(Tensors&& inputs) override {
    const std::lock_guard turn(*turns_);
    check(state_);
    state_.released = !is_graph_retained(); // even if this pass fails
    ParameterGradients parameters(
        tensors_of(state_.parameters),
        wanted_of(
            *this,
            state_.inputs.size() + state_.conditions.size(),
            state_.parameters.size()));
    AfterRun after = after_run(arrived(std::move(inputs)));
    const bool goes_on = after.needs_grad[0];

    BeforeRun before = step(std::move(after), parameters);
    Tensors results = std::move(before.grad_inputs);
    before.grad_conditions.resize(state_.conditions.size());
    append(results, std::move(before.grad_conditions));
    append(results, parameters.take());
    if (front_ != nullptr) {
      append(results, values_for_front(std::move(before.inputs), goes_on));
    }
    results.resize(num_outputs()); // no values for what is before the first
    if (!is_graph_retained()) {
      release(state_);
      kept_.clear();
    }
    return results;
  }

  /// What backward_step() is told.
  AfterRun after_run(Arrived arrived) {
    AfterRun after;
    after.retain_graph = is_graph_retained();
    after.outputs = state_.recording.outputs_or(
        all_defined(arrived.values) ? std::move(arrived.values) : kept_,
        after.retain_graph);
    TORCH_INTERNAL_ASSERT(
        !after.outputs.empty(), "a pass that begins inside of a sequence");
    after.grad_outputs = std::move(arrived.gradients);
    after.kept_inputs = tensors_of(state_.inputs);
    after.needs_grad = wanted_of(*this, 0, state_.inputs.size());
    after.has_log_det = state_.has_log_det;
    after.grad_log_det = std::move(arrived.grad_log_det);
    after.conditions = tensors_of(state_.conditions);
    after.needs_condition_grad =
        wanted_of(*this, state_.inputs.size(), state_.conditions.size());
    return after;
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

  /// The values for the present pass, if that goes on there; where gradients
  /// have a graph they are left there, for all passes.
  Tensors values_for_front(Tensors values, bool goes_on) {
    Tensors none(values.size());
    if (at::GradMode::is_enabled()) {
      front_->keep(std::move(values));
      return none;
    }
    return goes_on ? std::move(values) : std::move(none);
  }

  NodeState state_;
  size_t index_;
  ChainNode* front_; // an edge holds it
  std::shared_ptr<std::mutex> turns_;
  Tensors kept_;
};

/// The end of a chain: keeps its output, and begins every pass with it. The
/// gradient of the log-determinant, a sum over blocks, goes to each of them.
class OutputNode final : public torch::autograd::Node {
 public:
  /// `form` is what the last block returned, its tensors apart.
  OutputNode(NodeState state, Streams form)
      : state_(std::move(state)), form_(std::move(form)) {}

  std::string name() const override {
    return "memcnn::InvertibleFunction(ReversibleSequence)";
  }

  const NodeState& state() const {
    return state_;
  }

 private:
  Tensors apply(Tensors&& grad_outputs) override {
    const std::lock_guard lock(mutex_); // as LibTorch's own nodes do
    check(state_);
    Tensors results = as_last_block(std::move(grad_outputs[0]));
    append(results, as_last_block(std::move(take_outputs(state_)[0])));
    if (grad_outputs.size() > 1) {
      results.resize(num_outputs(), grad_outputs[1]);
    }
    if (!is_graph_retained()) {
      release(state_);
    }
    return results;
  }

  /// A whole in the form that the last block returned.
  Tensors as_last_block(at::Tensor whole) const {
    return form_.whole(std::move(whole))
        .take_in(form_.split_dim(), state_.place);
  }

  NodeState state_;
  Streams form_;
};

} // namespace memcnn::detail
