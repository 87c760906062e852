// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/attached.h>
#include <memcnn/detail/capture.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/freed_storage.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/local_run.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/detail/saved.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// All that one autograd node knows: which map ran, what it needs to run back.
///
/// There are two kinds of such nodes: InvertibleFunction (detail/node.h) is a
/// module between the caller's tensors, BlockNode (detail/chain_nodes.h) a block
/// of a chain, between other blocks.
struct NodeState : torch::CustomClassHolder {
  NodeState(
      std::string place_,
      std::shared_ptr<Invertible> block_,
      Direction direction_,
      bool keep_inputs_,
      RecordingOptions options)
      : place(std::move(place_)),
        block(std::move(block_)),
        direction(direction_),
        keep_inputs(keep_inputs_),
        recording(Recording::start(options)) {}

  std::string place; // "InvertibleModuleWrapper::forward()"
  std::shared_ptr<Invertible> block;
  Direction direction;
  bool keep_inputs;
  Recording recording;
  at::Device device = at::kCPU;
  CaptureId capture = 0; // in which forward ran

  std::vector<Saved> inputs; // those kept; the others are undefined
  std::vector<Saved> outputs; // none if all inputs are kept
  std::vector<Saved> parameters;
  std::vector<Saved> conditions;
  bool has_log_det = false; // the run was asked for one, which is not 0
  std::vector<std::optional<FreedStorage>> freed; // one an input
  bool released = false;
};

/// Stops where a run as nodes cannot begin.
inline void check_defined(const std::string& place, const Tensors& inputs) {
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(
        input.defined(),
        place,
        ": expected tensors, but got an undefined one. Pass an empty tensor "
        "instead.");
  }
}

inline void check_returned(const std::string& place, const at::Tensor& output) {
  TORCH_CHECK_VALUE(
      output.defined(),
      place,
      ": expected defined tensors from the module, but got an undefined one. "
      "Return an empty tensor instead.");
}

inline Tensors tensors_of(const std::vector<Saved>& saved) {
  Tensors tensors;
  tensors.reserve(saved.size());
  for (const Saved& each : saved) {
    tensors.push_back(each.get());
  }
  return tensors;
}

/// Stops where a tensor that backward needs is not what it was in forward. The
/// words say which it is, what happened to it, and the cure.
inline void check_unchanged(
    const NodeState& state,
    const std::vector<Saved>& saved,
    const char* expected,
    const char* cure) {
  for (const Saved& each : saved) {
    TORCH_CHECK(
        each.unchanged(),
        state.place,
        ": expected ",
        expected,
        ", but got one that was modified in place (",
        describe(each.get()),
        "). ",
        cure);
  }
}

/// Stops where a parameter has other memory: its gradient would be taken at
/// numbers that forward did not see.
inline void check_same_memory(const NodeState& state) {
  for (const Saved& parameter : state.parameters) {
    TORCH_CHECK(
        parameter.keeps_memory(),
        state.place,
        ": expected its parameters to keep their memory from forward to "
        "backward, but got one with other memory by to(), set_data() or set_() "
        "(",
        describe(parameter.get()),
        "). Convert the module before forward or after backward.");
  }
}

inline void check_whole(const NodeState& state) {
  for (const Saved& output : state.outputs) {
    const at::Tensor& tensor = output.get();
    TORCH_CHECK(
        !tensor.has_storage() || tensor.numel() == 0 ||
            !is_emptied(*tensor.storage().unsafeGetStorageImpl()),
        state.place,
        ": expected its output to be whole in backward, but the block after "
        "it freed it and its own backward did not run (",
        describe(tensor),
        "). Set keep_input(true) on that block.");
  }
}

inline void check_capture(const NodeState& state) {
  const CaptureId capture = capture_of(state.device);
  TORCH_CHECK(
      capture == state.capture,
      state.place,
      ": expected backward where forward ran, which was ",
      describe_capture(state.capture),
      ", but got ",
      describe_capture(capture),
      " (",
      state.device,
      "). Capture forward and backward as one graph, or run both eagerly.");
}

/// Stops where a node cannot run back rightly.
inline void check(const NodeState& state) {
  TORCH_CHECK(
      !state.released,
      state.place,
      ": expected one backward pass, but got a second one after its memory "
      "was freed. Pass retain_graph = true to the first.");
  check_capture(state);
  check_unchanged(
      state,
      state.outputs,
      "its output to be unchanged until backward, which rebuilds the input "
      "from it",
      "Use the out-of-place form of the operation after it.");
  check_whole(state);
  check_unchanged(
      state,
      state.inputs,
      "the inputs that it keeps to be unchanged until backward",
      "Use the out-of-place form of the operation.");
  check_unchanged(
      state,
      state.conditions,
      "the conditions that it was given to be unchanged until backward",
      "Use the out-of-place form of the operation, or pass a clone().");
  check_unchanged(
      state,
      state.parameters,
      "its parameters to be unchanged between forward and backward",
      "Step the optimiser after backward.");
  check_same_memory(state);
}

/// What a node keeps of the conditions of its run: aliases, without their graph.
inline std::vector<Saved> saved_conditions(at::TensorList conditions) {
  std::vector<Saved> saved;
  for (const at::Tensor& condition : conditions) {
    saved.emplace_back(detached(condition));
  }
  return saved;
}

/// Whether another pass over the graph may follow the present one.
inline bool is_graph_retained() {
  return torch::autograd::get_current_graph_task_keep_graph();
}

/// A node's outputs, for the present pass. Unless the graph is retained their
/// memory is handed over for good.
inline Tensors take_outputs(NodeState& state) {
  const bool retain = is_graph_retained();
  Tensors outputs;
  for (Saved& output : state.outputs) {
    outputs.push_back(retain ? output.get() : output.take());
  }
  state.released = !retain; // even if this pass fails
  return outputs;
}

/// The gradients that the present pass wants of a running node's arguments,
/// from the first one on.
inline std::vector<bool>
wanted_of(const torch::autograd::Node& node, size_t first, size_t count) {
  std::vector<bool> wanted;
  wanted.reserve(count);
  for (size_t i = first; i < first + count; ++i) {
    wanted.push_back(node.task_should_compute_output(i));
  }
  return wanted;
}

/// A block's own step, whatever that is.
inline BeforeRun step_back(
    Invertible& block,
    Direction direction,
    AfterRun after,
    Recording& recording,
    ParameterGradients& parameters) {
  const Tensors kept = after.kept_inputs;
  BeforeRun before =
      block.backward_step(direction, std::move(after), recording, parameters);
  check_rebuilt(
      block.type_name(),
      name_of(direction),
      "backward_step",
      before.inputs,
      kept,
      recording.inputs());
  return before;
}

/// The default step, with gradients that have a graph themselves (create_graph):
/// from inputs that are rebuilt in value, but attached to where the true ones
/// came from. The node that stands for the run is the running one.
struct DifferentiableStep {
  static BeforeRun
  back(NodeState& state, AfterRun after, ParameterGradients& parameters) {
    BeforeRun before;
    before.inputs =
        state.block->rebuild(state.direction, after, state.recording);

    // Inputs of the node come first, and then conditions.
    Attached arguments(
        joined(before.inputs, after.conditions),
        *torch::autograd::get_current_node());
    const Recording::ReplayScope scope(state.recording);
    LocalRun again(
        state.block->module(),
        arguments.tensors(),
        joined(after.needs_grad, after.needs_condition_grad),
        parameters);
    state.block->run_again(state.direction, after, again, state.recording);
    take_gradients(again, std::move(after), GraphUse::kDifferentiate, before);
    arguments.open();
    return before;
  }
};

/// Lets go of all that a node needed to run back.
inline void release(NodeState& state) {
  state.inputs.clear();
  state.outputs.clear();
  state.parameters.clear();
  state.conditions.clear();
  state.freed.clear();
  state.recording = Recording::off();
  state.released = true;
}

} // namespace memcnn::detail
