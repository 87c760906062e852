// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/capture.h>
#include <memcnn/detail/describe.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/node_state.h>
#include <memcnn/detail/parts.h>
#include <memcnn/detail/saved.h>
#include <memcnn/detail/saved_tensors.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/plain_autograd.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The autograd node: one invertible map, as a function of its inputs and of
/// its module's parameters (Note [Recomputation], rule 3).
class InvertibleFunction
    : public torch::autograd::Function<InvertibleFunction> {
 public:
  using State = c10::intrusive_ptr<NodeState>;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      at::TensorList inputs,
      at::TensorList conditions,
      at::TensorList parameters,
      const State& state) {
    context->set_materialize_grads(false);
    state->recording.note_inputs(inputs);
    std::vector<uint32_t> versions;
    for (const at::Tensor& input : inputs) {
      versions.push_back(version_of(input));
    }
    state->conditions = saved_conditions(conditions);
    std::optional<LogDetSum> log_det;
    if (state->has_log_det) {
      log_det.emplace(inputs[0]);
    }
    Tensors outputs = state->block->run_with(
        state->direction,
        inputs.vec(),
        RunExtras{conditions, log_det ? &*log_det : nullptr},
        state->recording);
    state->recording.replay_from_here();
    state->device = compute_device_of(outputs);
    state->capture = capture_of(state->device);
    check_kept(*state, inputs, versions);
    context->mark_non_differentiable(save(*state, inputs, outputs, parameters));
    // A node's saved_data holds IValues, and a capsule is the one that holds an
    // object of any class.
    context->saved_data["state"] = c10::IValue::make_capsule(state);
    if (log_det) { // backward does not need it: not saved
      outputs.push_back(log_det->take());
    }
    return outputs;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list& grad_outputs) {
    const State state = c10::static_intrusive_pointer_cast<NodeState>(
        context->saved_data.at("state").toCapsule());
    check(*state);
    const torch::autograd::Node& node = *torch::autograd::get_current_node();
    const size_t inputs = state->inputs.size();
    const size_t conditions = state->conditions.size();
    ParameterGradients parameters(
        tensors_of(state->parameters),
        wanted_of(node, inputs + conditions, state->parameters.size()));
    AfterRun after =
        after_run(*state, grad_outputs, wanted_of(node, 0, inputs));
    after.needs_condition_grad = wanted_of(node, inputs, conditions);
    BeforeRun before = at::GradMode::is_enabled()
        ? DifferentiableStep::back(*state, std::move(after), parameters)
        : step_back(
              *state->block,
              state->direction,
              std::move(after),
              state->recording,
              parameters);

    restore_inputs(*state, before.inputs);
    Tensors gradients = std::move(before.grad_inputs);
    before.grad_conditions.resize(conditions);
    for (at::Tensor& gradient : before.grad_conditions) {
      gradients.push_back(std::move(gradient));
    }
    for (at::Tensor& gradient : parameters.take()) {
      gradients.push_back(std::move(gradient));
    }
    gradients.emplace_back(); // of the state
    if (!is_graph_retained()) {
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
      check_returned(state.place, output);
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

  /// What backward_step() is told.
  static AfterRun after_run(
      NodeState& state,
      torch::autograd::variable_list& grad_outputs,
      std::vector<bool> needs_grad) {
    AfterRun after;
    after.retain_graph = is_graph_retained();
    after.outputs = take_outputs(state);
    after.has_log_det = state.has_log_det;
    if (state.has_log_det) {
      after.grad_log_det = std::move(grad_outputs.back());
      grad_outputs.pop_back();
    }
    after.grad_outputs = std::move(grad_outputs);
    after.conditions = tensors_of(state.conditions);
    after.kept_inputs = tensors_of(state.inputs);
    after.needs_grad = std::move(needs_grad);
    return after;
  }

  static void restore_inputs(NodeState& state, Tensors& inputs) {
    for (size_t i = 0; i < state.freed.size(); ++i) {
      if (state.freed[i]) {
        state.freed[i]->restore(std::move(inputs[i]));
      }
    }
  }
};

/// What a node of this kind knows; null for other nodes.
inline const NodeState* state_of_function(const torch::autograd::Node& node) {
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

/// Runs a module as one autograd node. Returns its log-determinant last, where the
/// state says that it is asked for one.
inline Tensors run_node(
    c10::intrusive_ptr<NodeState> state,
    const Tensors& inputs,
    const Tensors& conditions = {}) {
  check_defined(state->place, inputs);
  const Tensors parameters = trained_parameters(state->block->module());
  return InvertibleFunction::apply(
      at::TensorList(inputs),
      at::TensorList(conditions),
      at::TensorList(parameters),
      state);
}

} // namespace memcnn::detail
