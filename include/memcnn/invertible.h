// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/local_run.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn {
namespace detail {
struct DifferentiableStep;
}

/// Which of the two maps of an invertible module is meant.
enum class Direction { kForward, kInverse };

inline Direction opposite(Direction direction) {
  return direction == Direction::kForward ? Direction::kInverse
                                          : Direction::kForward;
}

inline const char* name_of(Direction direction) {
  return direction == Direction::kForward ? "forward" : "inverse";
}

/// Where a backward step begins: after a run.
struct AfterRun {
  /// The run's results; empty where every input was kept. Memory that nobody
  /// else refers to may be overwritten.
  std::vector<at::Tensor> outputs;
  /// Their gradients, likewise; undefined where none arrived.
  std::vector<at::Tensor> grad_outputs;
  /// For every input: the tensor itself where it was kept (integer tensors and
  /// masks, or keep_input), else undefined: to be rebuilt.
  std::vector<at::Tensor> kept_inputs;
  /// For every input: whether its gradient is wanted.
  std::vector<bool> needs_grad;
  /// Another backward pass over the same run may follow.
  bool retain_graph = false;
};

/// Where it ends: before that run. One entry an input each.
struct BeforeRun {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> grad_inputs; // undefined where not wanted
};

/// Interface: what the memory-saving machinery asks of an invertible module.
///
/// A module with plain `forward` and `inverse` members needs none of this: it
/// is adapted (detail/plain_module.h) and gets the default backward step.
/// Derive from it, beside torch::nn::Cloneable, for a backward step that costs
/// less. To read next: detail/coupling.h, which does.
class Invertible {
 public:
  virtual ~Invertible() = default;

  /// Maps inputs to results in the given direction. Every branch (a module that
  /// may draw random numbers, change buffers or compute under autocast) runs
  /// once, through `recording`, which lets it run again alike in backward;
  /// nothing else may do any of these. Where no graph is built, inputs that
  /// nobody else refers to may be overwritten.
  virtual std::vector<at::Tensor> run(
      Direction direction,
      std::vector<at::Tensor> inputs,
      Recording& recording) = 0;

  /// From after a run to before it, adding the gradients of parameters to
  /// `parameters`. An autograd node calls it in backward: its own, or that of
  /// what is around it; never with a graph.
  ///
  /// The default rebuilds the inputs by the opposite map, runs again with a
  /// graph, and differentiates: it costs two runs beside the gradient.
  virtual BeforeRun backward_step(
      Direction direction,
      AfterRun after,
      Recording& recording,
      ParameterGradients& parameters) {
    BeforeRun before;
    before.inputs = rebuild(direction, after, recording);
    after.outputs.clear();

    const Recording::ReplayScope scope(recording);
    detail::LocalRun again(
        module(),
        detail::cut_off(before.inputs, after.needs_grad),
        after.needs_grad,
        parameters);
    {
      const at::AutoGradMode with_graph(true);
      again.outputs = run(direction, again.arguments, recording);
    }
    before.grad_inputs = again.gradients(std::move(after.grad_outputs));
    return before;
  }

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

 protected:
  friend struct detail::DifferentiableStep; // of the autograd node

  /// The inputs of a run: rebuilt by the opposite map where they were not kept.
  /// Throws c10::Error if one is not like the true one.
  std::vector<at::Tensor>
  rebuild(Direction direction, const AfterRun& after, Recording& recording) {
    const auto& kept = after.kept_inputs;
    if (detail::all_defined(kept)) {
      return kept;
    }
    const at::NoGradGuard no_grad;
    const Direction back = opposite(direction);
    std::vector<at::Tensor> rebuilt = run(back, after.outputs, recording);
    detail::check_rebuilt(
        type_name(),
        name_of(direction),
        name_of(back),
        rebuilt,
        kept,
        recording.inputs());
    return detail::kept_or(kept, std::move(rebuilt));
  }
};

} // namespace memcnn
