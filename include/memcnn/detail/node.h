// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/attached.h>
#include <memcnn/detail/capture.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/freed_storage.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/local_run.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/detail/saved.h>
#include <memcnn/detail/saved_tensors.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/plain_autograd.h>
#include <memcnn/recording.h>

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// All that one autograd node knows: which map ran, what it needs to run back.
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
  std::vector<std::optional<FreedStorage>> freed; // one an input
  bool released = false;
};

/// The autograd node: one invertible map, as a function of its inputs and of
/// its module's parameters (Note [Recomputation], rule 3).
class InvertibleFunction
    : public torch::autograd::Function<InvertibleFunction> {
 public:
  using State = c10::intrusive_ptr<NodeState>;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      at::TensorList inputs,
      at::TensorList parameters,
      const State& state) {
    context->set_materialize_grads(false);
    state->recording.note_inputs(inputs);
    std::vector<uint32_t> versions;
    for (const at::Tensor& input : inputs) {
      versions.push_back(version_of(input));
    }
    Tensors outputs =
        state->block->run(state->direction, inputs.vec(), state->recording);
    state->recording.replay_from_here();
    state->device = compute_device_of(outputs);
    state->capture = capture_of(state->device);
    check_kept(*state, inputs, versions);
    context->mark_non_differentiable(save(*state, inputs, outputs, parameters));
    // A node's saved_data holds IValues, and a capsule is the one that holds an
    // object of any class.
    context->saved_data["state"] = c10::IValue::make_capsule(state);
    return outputs;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list& grad_outputs) {
    const State state = c10::static_intrusive_pointer_cast<NodeState>(
        context->saved_data.at("state").toCapsule());
    check(*state);
    const auto needed = [&](size_t first, size_t count) {
      std::vector<bool> result;
      for (size_t i = first; i < first + count; ++i) {
        result.push_back(context->needs_input_grad(i));
      }
      return result;
    };
    const size_t inputs = state->inputs.size();
    ParameterGradients parameters(
        tensors_of(state->parameters),
        needed(inputs, state->parameters.size()));
    AfterRun after = after_run(*state, grad_outputs, needed(0, inputs));
    BeforeRun before = at::GradMode::is_enabled()
        ? differentiable_step(*state, std::move(after), parameters)
        : step(*state, std::move(after), parameters);

    restore_inputs(*state, before.inputs);
    Tensors gradients = std::move(before.grad_inputs);
    for (at::Tensor& gradient : parameters.take()) {
      gradients.push_back(std::move(gradient));
    }
    gradients.emplace_back(); // of the state
    if (!torch::autograd::get_current_graph_task_keep_graph()) {
      release(*state);
    }
    return gradients;
  }

  static const NodeState& state_in(
      const torch::autograd::AutogradContext& context) {
    return *static_cast<const NodeState*>(
        context.saved_data.at("state").toCapsule().get());
  }

 private:
  static bool is_differentiable(const at::Tensor& tensor) {
    return tensor.is_floating_point() || tensor.is_complex();
  }

  /// Stops where inputs that are kept for the second run are not those of the
  /// first any more.
  static void check_kept(
      const NodeState& state,
      at::TensorList inputs,
      const std::vector<uint32_t>& versions) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      TORCH_CHECK(
          !(state.keep_inputs || !is_differentiable(inputs[i])) ||
              version_of(inputs[i]) == versions[i],
          state.place,
          ": expected the module to leave the inputs that are kept for "
          "backward as they are, but got a change in place (",
          describe(inputs[i]),
          "). Let it begin with an operation that is not in place.");
    }
  }

  /// Notes what backward will need; returns the outputs that have no gradient.
  static Tensors save(
      NodeState& state,
      at::TensorList inputs,
      const Tensors& outputs,
      at::TensorList parameters) {
    // Aliases without a graph: an output that its own node referred to would
    // never die.
    bool all_kept = true;
    for (const at::Tensor& input : inputs) {
      const bool keep = state.keep_inputs || !is_differentiable(input);
      state.inputs.push_back(keep ? Saved(detached(input)) : Saved());
      all_kept = all_kept && keep;
    }
    Tensors not_differentiable;
    for (const at::Tensor& output : outputs) {
      TORCH_CHECK_VALUE(
          output.defined(),
          state.place,
          ": expected defined tensors from the module, but got an undefined "
          "one. Return an empty tensor instead.");
      if (!is_differentiable(output)) {
        not_differentiable.push_back(output);
      }
      if (!all_kept) {
        state.outputs.emplace_back(detached(output));
      }
    }
    for (const at::Tensor& parameter : parameters) {
      state.parameters.emplace_back(parameter);
    }
    state.freed.resize(inputs.size());
    return not_differentiable;
  }

  static Tensors tensors_of(const std::vector<Saved>& saved) {
    Tensors tensors;
    for (const Saved& each : saved) {
      tensors.push_back(each.get());
    }
    return tensors;
  }

  static void check(const NodeState& state) {
    TORCH_CHECK(
        !state.released,
        state.place,
        ": expected one backward pass, but got a second one after its memory "
        "was freed. Pass retain_graph = true to the first.");
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
    for (const Saved& output : state.outputs) {
      TORCH_CHECK(
          output.unchanged(),
          state.place,
          ": expected its output to be unchanged until backward, which "
          "rebuilds the input from it, but got one that was modified in place "
          "(",
          describe(output.get()),
          "). Use the out-of-place form of the operation after it.");
      TORCH_CHECK(
          !output.get().has_storage() || output.get().numel() == 0 ||
              !is_emptied(*output.get().storage().unsafeGetStorageImpl()),
          state.place,
          ": expected its output to be whole in backward, but the block after "
          "it freed it and its own backward did not run (",
          describe(output.get()),
          "). Set keep_input(true) on that block.");
    }
    for (const Saved& input : state.inputs) {
      TORCH_CHECK(
          input.unchanged(),
          state.place,
          ": expected the inputs that it keeps to be unchanged until backward, "
          "but got one that was modified in place (",
          describe(input.get()),
          "). Use the out-of-place form of the operation.");
    }
    for (const Saved& parameter : state.parameters) {
      TORCH_CHECK(
          parameter.unchanged(),
          state.place,
          ": expected its parameters to be unchanged between forward and "
          "backward, but got one that was modified in place (",
          describe(parameter.get()),
          "). Step the optimiser after backward.");
    }
  }

  /// What backward_step() is told. Unless the graph is retained the outputs'
  /// memory is handed over for good.
  static AfterRun after_run(
      NodeState& state,
      torch::autograd::variable_list& grad_outputs,
      std::vector<bool> needs_grad) {
    AfterRun after;
    after.retain_graph = torch::autograd::get_current_graph_task_keep_graph();
    for (Saved& output : state.outputs) {
      after.outputs.push_back(
          after.retain_graph ? output.get() : output.take());
    }
    state.released = !after.retain_graph; // even if this pass fails
    after.grad_outputs = std::move(grad_outputs);
    after.kept_inputs = tensors_of(state.inputs);
    after.needs_grad = std::move(needs_grad);
    return after;
  }

  /// The block's own step, whatever that is.
  static BeforeRun
  step(NodeState& state, AfterRun after, ParameterGradients& parameters) {
    const Tensors kept = after.kept_inputs;
    BeforeRun before = state.block->backward_step(
        state.direction, std::move(after), state.recording, parameters);
    check_rebuilt(
        state.block->type_name(),
        name_of(state.direction),
        "backward_step",
        before.inputs,
        kept,
        state.recording.inputs());
    return before;
  }

  /// The default step, with gradients that have a graph themselves
  /// (create_graph): from inputs that are rebuilt in value, but attached to
  /// where the true ones came from.
  static BeforeRun differentiable_step(
      NodeState& state,
      AfterRun after,
      ParameterGradients& parameters) {
    BeforeRun before;
    before.inputs =
        state.block->rebuild(state.direction, after, state.recording);

    Attached inputs(before.inputs, *torch::autograd::get_current_node());
    const Recording::ReplayScope scope(state.recording);
    LocalRun again(
        state.block->module(), inputs.tensors(), after.needs_grad, parameters);
    again.outputs =
        state.block->run(state.direction, again.arguments, state.recording);
    before.grad_inputs = again.gradients(
        std::move(after.grad_outputs), GraphUse::kDifferentiate);
    inputs.open();
    return before;
  }

  static void restore_inputs(NodeState& state, Tensors& inputs) {
    for (size_t i = 0; i < state.freed.size(); ++i) {
      if (state.freed[i]) {
        state.freed[i]->restore(std::move(inputs[i]));
      }
    }
  }

  static void release(NodeState& state) {
    state.inputs.clear();
    state.outputs.clear();
    state.parameters.clear();
    state.freed.clear();
    state.recording = Recording::off();
    state.released = true;
  }
};

/// What one of our nodes knows; null for other nodes.
inline const NodeState* state_of(const torch::autograd::Node& node) {
  using OurNode = torch::autograd::CppNode<InvertibleFunction>;
  const auto* ours = dynamic_cast<const OurNode*>(&node);
  return ours != nullptr ? &InvertibleFunction::state_in(ours->ctx_) : nullptr;
}

/// Whether a call of this module with these inputs is to save memory: whether
/// the caller records a graph that it would be part of (Note [Recomputation],
/// rule 6), and asks for no plain autograd.
inline bool runs_as_node(
    const Tensors& inputs,
    const torch::nn::Module& module) {
  if (!at::GradMode::is_enabled() || PlainAutogradGuard::is_enabled() ||
      SavedTensors::are_dropped_here()) {
    return false;
  }
  for (const at::Tensor& input : inputs) {
    if (input.defined() && input.requires_grad()) {
      return true;
    }
  }
  return any_parameter(module, [](const at::Tensor& parameter) {
    return parameter.requires_grad();
  });
}

/// Runs a block as one autograd node.
inline Tensors run_node(
    c10::intrusive_ptr<NodeState> state,
    const Tensors& inputs) {
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(
        input.defined(),
        state->place,
        ": expected tensors, but got an undefined one. Pass an empty tensor "
        "instead.");
  }
  const Tensors parameters = trained_parameters(state->block->module());
  return InvertibleFunction::apply(
      at::TensorList(inputs), at::TensorList(parameters), state);
}

} // namespace memcnn::detail
