// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/describe.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/recording.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {

/// Which of the two maps of an invertible module is meant.
enum class Direction { kForward, kInverse };

inline Direction opposite(Direction direction) {
  return direction == Direction::kForward ? Direction::kInverse
                                          : Direction::kForward;
}

inline const char* name_of(Direction direction) {
  return direction == Direction::kForward ? "forward" : "inverse";
}

/// What backward knows about one run of an invertible module.
struct BackwardInput {
  /// The run's results. Memory that nobody else refers to may be overwritten.
  std::vector<at::Tensor> outputs;
  /// Their gradients, likewise; undefined where none arrived.
  std::vector<at::Tensor> grad_outputs;
  /// For every input of the run: the tensor itself where it was kept (integer
  /// tensors and masks, or keep_input), else undefined: to be rebuilt.
  std::vector<at::Tensor> kept_inputs;
  /// For every input: its sizes, where they are known; else empty.
  std::vector<std::vector<int64_t>> input_sizes;
  /// For every input: whether its gradient is wanted.
  std::vector<bool> needs_grad;
  /// Another backward pass over the same run may follow.
  bool retain_graph = false;
};

/// What backward gets for it, one entry an input each.
struct BackwardOutput {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> grad_inputs; // undefined where not wanted
};

namespace detail {

/// The last part of a backward step: from a run with a graph to the gradients
/// of its arguments, undefined where not wanted, and of its parameters, which
/// are added to `parameters`.
inline std::vector<at::Tensor> differentiate_run(
    const torch::nn::Module& module,
    const std::vector<at::Tensor>& arguments,
    std::vector<at::Tensor> outputs,
    BackwardInput given,
    ParameterGradients& parameters,
    GraphUse use = GraphUse::kFree) {
  std::vector<at::Tensor> leaves;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (given.needs_grad[i]) {
      leaves.push_back(arguments[i]);
    }
  }
  check_reaches_only(outputs, leaves, module);
  const std::vector<at::Tensor> wanted = parameters.wanted(module);
  std::vector<at::Tensor> gradients = local_gradient(
      std::move(outputs), std::move(given.grad_outputs), leaves, wanted, use);

  std::vector<at::Tensor> grad_inputs;
  auto next = gradients.begin();
  for (const bool needed : given.needs_grad) {
    grad_inputs.push_back(needed ? std::move(*next++) : at::Tensor());
  }
  for (const at::Tensor& parameter : wanted) {
    parameters.add(parameter, std::move(*next++));
  }
  return grad_inputs;
}

} // namespace detail

/// Interface: what the memory-saving machinery asks of an invertible module.
///
/// A module with plain `forward` and `inverse` members needs none of this: it
/// is adapted (detail/plain_module.h) and gets the default backward step.
/// Derive from it, beside torch::nn::Cloneable, for a backward step that costs
/// less.
class Invertible {
 public:
  virtual ~Invertible() = default;

  /// Maps inputs to results in the given direction. Every branch (a module that
  /// may draw random numbers, change buffers or compute under autocast) runs
  /// once, through `recording`; nothing else may do any of these. Where no
  /// graph is built, inputs that nobody else refers to may be overwritten.
  virtual std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      detail::Recording& recording) = 0;

  /// From results and their gradients to inputs and their gradients, adding the
  /// gradients of parameters to `parameters`. Called without a graph.
  ///
  /// The default rebuilds the inputs by the opposite map, runs again with a
  /// graph, and differentiates: it costs two runs beside the gradient.
  virtual BackwardOutput backward_step(
      Direction direction,
      BackwardInput given,
      detail::Recording& recording,
      detail::ParameterGradients& parameters);

  /// The dimension along which a coupling splits its input. Such a module takes
  /// (and then returns) its two halves as well as one whole tensor, in run()
  /// and backward_step(): between couplings of one split_dim halves are not
  /// joined (Note [Streams of a sequence], rule 1).
  virtual std::optional<int64_t> takes_halves_of() const {
    return std::nullopt;
  }

  /// The module that the parameters belong to.
  virtual torch::nn::Module& module() = 0;

  /// The name in messages, without template arguments.
  virtual std::string type_name() const = 0;

  /// The inputs: rebuilt by the opposite map where they were not kept.
  std::vector<at::Tensor> rebuild(
      Direction direction,
      const BackwardInput& given,
      detail::Recording& recording) {
    if (all_kept(given)) {
      return given.kept_inputs;
    }
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> rebuilt =
        run(opposite(direction), given.outputs, recording);
    TORCH_CHECK(
        rebuilt.size() == given.kept_inputs.size(),
        type_name(),
        "::backward(): expected ",
        name_of(opposite(direction)),
        "() to return the ",
        given.kept_inputs.size(),
        " inputs of ",
        name_of(direction),
        "(), but got ",
        rebuilt.size(),
        " tensors. Return one tensor for each input, in their order.");
    for (size_t i = 0; i < rebuilt.size(); ++i) {
      if (given.kept_inputs[i].defined()) {
        rebuilt[i] = given.kept_inputs[i];
      }
      TORCH_CHECK(
          given.input_sizes.empty() ||
              rebuilt[i].sizes() == at::IntArrayRef(given.input_sizes[i]),
          type_name(),
          "::backward(): expected ",
          name_of(opposite(direction)),
          "() to rebuild an input of sizes ",
          at::IntArrayRef(given.input_sizes[i]),
          ", but got ",
          detail::describe(rebuilt[i]),
          ". Let it undo ",
          name_of(direction),
          "(); is_invertible_module() checks that.");
    }
    return rebuilt;
  }

 private:
  static bool all_kept(const BackwardInput& given) {
    for (const at::Tensor& kept : given.kept_inputs) {
      if (!kept.defined()) {
        return false;
      }
    }
    return true;
  }
};

inline BackwardOutput Invertible::backward_step(
    Direction direction,
    BackwardInput given,
    detail::Recording& recording,
    detail::ParameterGradients& parameters) {
  BackwardOutput result;
  result.inputs = rebuild(direction, given, recording);
  given.outputs.clear();

  std::vector<at::Tensor> arguments = result.inputs;
  for (size_t i = 0; i < arguments.size(); ++i) {
    arguments[i] = arguments[i].detach();
    if (given.needs_grad[i]) {
      arguments[i].requires_grad_();
    }
  }
  const detail::Recording::ReplayScope scope(recording);
  std::vector<at::Tensor> outputs = [&] {
    const at::AutoGradMode with_graph(true);
    return run(direction, arguments, recording);
  }();
  result.grad_inputs = detail::differentiate_run(
      module(), arguments, std::move(outputs), std::move(given), parameters);
  return result;
}

} // namespace memcnn
