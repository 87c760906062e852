// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/freed_storage.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/recording.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// A tensor that backward will read, and the version it has to have by then.
class Saved {
 public:
  Saved() = default;
  /// Saves an alias without a graph: an output that its own node referred to
  /// would never die.
  explicit Saved(const at::Tensor& tensor)
      : tensor_(tensor.detach()), version_(tensor._version()) {}

  bool defined() const {
    return tensor_.defined();
  }
  bool unchanged() const {
    return !defined() || tensor_._version() == version_;
  }
  const at::Tensor& get() const {
    return tensor_;
  }
  at::Tensor take() {
    return std::move(tensor_);
  }

 private:
  at::Tensor tensor_;
  uint32_t version_ = 0;
};

/// All that one autograd node knows: which map ran, what it needs to run back.
struct NodeState : torch::CustomClassHolder {
  NodeState(
      std::string place_,
      std::shared_ptr<Invertible> map_,
      Direction direction_,
      bool keep_inputs_,
      bool preserve_rng_state)
      : place(std::move(place_)),
        map(std::move(map_)),
        direction(direction_),
        keep_inputs(keep_inputs_),
        recording(Recording::start(preserve_rng_state)) {}

  std::string place; // "InvertibleModuleWrapper::forward()"
  std::shared_ptr<Invertible> map;
  Direction direction;
  bool keep_inputs;
  Recording recording;

  std::vector<Saved> inputs; // those kept; the others are undefined
  std::vector<Saved> outputs; // none if all inputs are kept
  std::vector<Saved> parameters;
  std::vector<at::Tensor> parameter_handles;
  std::vector<std::vector<int64_t>> input_sizes;
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
    Tensors outputs =
        state->map->run(state->direction, inputs.vec(), state->recording);
    state->recording.replay_from_here();

    bool all_kept = true;
    for (const at::Tensor& input : inputs) {
      const bool keep = state->keep_inputs || !is_differentiable(input);
      state->inputs.push_back(keep ? Saved(input) : Saved());
      state->input_sizes.push_back(input.sizes().vec());
      all_kept = all_kept && keep;
    }
    Tensors not_differentiable;
    for (const at::Tensor& output : outputs) {
      TORCH_CHECK_VALUE(
          output.defined(),
          state->place,
          ": expected defined tensors from the module, but got an undefined "
          "one. Return an empty tensor instead.");
      if (!is_differentiable(output)) {
        not_differentiable.push_back(output);
      }
      if (!all_kept) {
        state->outputs.emplace_back(output);
      }
    }
    for (const at::Tensor& parameter : parameters) {
      state->parameters.emplace_back(parameter);
      state->parameter_handles.push_back(parameter);
    }
    state->freed.resize(inputs.size());
    context->mark_non_differentiable(not_differentiable);
    context->saved_data["state"] = c10::IValue::make_capsule(state);
    return outputs;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list& grad_outputs) {
    const State state = c10::static_intrusive_pointer_cast<NodeState>(
        context->saved_data.at("state").toCapsule());
    check(*state);
    const size_t inputs = state->input_sizes.size();
    const size_t parameters = state->parameters.size();

    std::vector<bool> needed;
    for (size_t i = 0; i < inputs + parameters; ++i) {
      needed.push_back(context->needs_input_grad(i));
    }
    Tensors gradients = at::GradMode::is_enabled()
        ? differentiable_gradients(*state, grad_outputs, needed)
        : recomputed_gradients(*state, grad_outputs, needed);
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

  static void check(const NodeState& state) {
    TORCH_CHECK(
        !state.released,
        state.place,
        ": expected one backward pass, but got a second one after its memory "
        "was freed. Pass retain_graph = true to the first.");
    for (const Saved& output : state.outputs) {
      TORCH_CHECK(
          output.unchanged(),
          state.place,
          ": expected its output to be unchanged until backward, which "
          "rebuilds "
          "the input from it, but got one that was modified in place (",
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
  static BackwardInput given(
      NodeState& state,
      torch::autograd::variable_list& grad_outputs,
      const std::vector<bool>& needed) {
    const bool retain = torch::autograd::get_current_graph_task_keep_graph();
    BackwardInput given;
    given.retain_graph = retain;
    for (Saved& output : state.outputs) {
      given.outputs.push_back(retain ? output.get() : output.take());
    }
    state.released = !retain; // even if this pass fails
    given.grad_outputs = std::move(grad_outputs);
    given.input_sizes = state.input_sizes;
    for (size_t i = 0; i < state.inputs.size(); ++i) {
      given.kept_inputs.push_back(state.inputs[i].get());
      given.needs_grad.push_back(needed[i]);
    }
    return given;
  }

  static std::vector<bool> parameter_part(
      const NodeState& state,
      const std::vector<bool>& needed) {
    const auto first =
        needed.begin() + static_cast<std::ptrdiff_t>(state.inputs.size());
    return {first, needed.end()};
  }

  static Tensors recomputed_gradients(
      NodeState& state,
      torch::autograd::variable_list& grad_outputs,
      const std::vector<bool>& needed) {
    ParameterGradients parameters(
        state.parameter_handles, parameter_part(state, needed));
    BackwardOutput result = state.map->backward_step(
        state.direction,
        given(state, grad_outputs, needed),
        state.recording,
        parameters);
    restore_inputs(state, result.inputs);
    Tensors gradients = std::move(result.grad_inputs);
    for (at::Tensor& gradient : parameters.take()) {
      gradients.push_back(std::move(gradient));
    }
    return gradients;
  }

  /// Gradients that have a graph themselves (create_graph): from inputs that
  /// are rebuilt in value, but attached to where the true inputs came from.
  static Tensors differentiable_gradients(
      NodeState& state,
      torch::autograd::variable_list& grad_outputs,
      const std::vector<bool>& needed) {
    BackwardInput known = given(state, grad_outputs, needed);
    Tensors arguments =
        state.map->rebuild(state.direction, known, state.recording);
    Tensors leaves;
    const auto node = torch::autograd::get_current_node();
    for (size_t i = 0; i < arguments.size(); ++i) {
      arguments[i] = arguments[i].detach();
      const torch::autograd::Edge edge = node->next_edge(i);
      if (edge.is_valid()) {
        torch::autograd::impl::set_gradient_edge(arguments[i], edge);
        // Differentiated with respect to a view: the hooks of the input itself
        // belong to the outer pass.
        arguments[i] = arguments[i].view_as(arguments[i]);
      }
      if (needed[i]) {
        leaves.push_back(arguments[i]);
      }
    }
    Tensors wanted;
    for (size_t i = 0; i < state.parameter_handles.size(); ++i) {
      if (needed[arguments.size() + i]) {
        wanted.push_back(state.parameter_handles[i]);
      }
    }
    const Recording::ReplayScope scope(state.recording);
    Tensors outputs =
        state.map->run(state.direction, arguments, state.recording);
    check_reaches_only(outputs, arguments, state.map->module());
    Tensors found = local_gradient(
        std::move(outputs),
        std::move(known.grad_outputs),
        leaves,
        wanted,
        GraphUse::kDifferentiate);
    restore_inputs(state, arguments);

    Tensors gradients;
    auto next = found.begin();
    for (const bool need : needed) {
      gradients.push_back(need ? std::move(*next++) : at::Tensor());
    }
    return gradients;
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
    state.parameter_handles.clear();
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

/// Whether the caller records a graph that a call of this module with these
/// inputs would be part of (Note [Recomputation], rule 6).
inline bool records_graph(
    const Tensors& inputs,
    const torch::nn::Module& module) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  for (const at::Tensor& input : inputs) {
    if (input.defined() && input.requires_grad()) {
      return true;
    }
  }
  return !trained_parameters(module).empty();
}

/// Runs a map as one autograd node.
inline Tensors run_node(
    c10::intrusive_ptr<NodeState> state,
    const Tensors& inputs,
    const torch::nn::Module& module) {
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(
        input.defined(),
        state->place,
        ": expected tensors, but got an undefined one. Pass an empty tensor "
        "instead.");
  }
  const Tensors parameters = trained_parameters(module);
  return InvertibleFunction::apply(
      at::TensorList(inputs), at::TensorList(parameters), state);
}

} // namespace memcnn::detail
