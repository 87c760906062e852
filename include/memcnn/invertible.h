// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/local_run.h>
#include <memcnn/detail/log_det_sum.h>
#include <memcnn/detail/rebuilt.h>
#include <memcnn/log_det.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <cstddef>
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

/// What a run is given, and asked for, beside its inputs.
struct RunExtras {
  /// The run reads them, and leaves them as they are.
  at::TensorList conditions;
  /// Where it adds its log-determinant; null where nobody asks for that.
  detail::LogDetSum* log_det = nullptr;
};

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
  /// The run was asked for its log-determinant.
  bool has_log_det = false;
  /// The gradient of that, (N): one number a sample; undefined where none
  /// arrived.
  at::Tensor grad_log_det;
  /// The conditions that the run was given.
  std::vector<at::Tensor> conditions;
  /// For every condition: whether its gradient is wanted.
  std::vector<bool> needs_condition_grad;
};

/// Where it ends: before that run. One entry an input each, or a condition.
struct BeforeRun {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> grad_inputs; // undefined where not wanted
  std::vector<at::Tensor> grad_conditions = {}; // likewise
};

namespace detail {

/// The gradients of a run whose graph is there: of its inputs and then its
/// conditions, which are its arguments. What it returned has the log-determinant
/// last, where the run was asked for one.
inline void
take_gradients(LocalRun& run, AfterRun after, GraphUse use, BeforeRun& before) {
  if (after.has_log_det) {
    after.grad_outputs.push_back(std::move(after.grad_log_det));
  }
  before.grad_inputs = run.gradients(std::move(after.grad_outputs), use);
  before.grad_conditions =
      split_off(before.grad_inputs, after.conditions.size());
}

} // namespace detail

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

  /// Likewise with conditions, and with a log-determinant that is added to where
  /// `extras` say. The default does without both, and throws c10::ValueError
  /// where it is given conditions, or asked for a log-determinant that is not
  /// known to be 0.
  virtual std::vector<at::Tensor> run_with(
      Direction direction,
      std::vector<at::Tensor> inputs,
      const RunExtras& extras,
      Recording& recording) {
    check_extras(direction, extras);
    return run(direction, std::move(inputs), recording);
  }

  /// What is known of its log-determinant. Only where this is kSample a backward
  /// step is told of a gradient of it.
  virtual LogDet log_det() const {
    return LogDet::kUnknown;
  }

  /// How many conditions a run takes; none where any number will do.
  virtual std::optional<size_t> condition_count() const {
    return 0;
  }

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
    const std::vector<bool> needs_grad =
        detail::joined(after.needs_grad, after.needs_condition_grad);
    detail::LocalRun again(
        module(),
        detail::cut_off(
            detail::joined(before.inputs, after.conditions), needs_grad),
        needs_grad,
        parameters);
    {
      const at::AutoGradMode with_graph(true);
      run_again(direction, after, again, recording);
    }
    detail::take_gradients(
        again, std::move(after), detail::GraphUse::kFree, before);
    return before;
  }

  /// The dimension along which a coupling splits its input. Such a module takes
  /// (and then returns) its two halves as well as one whole tensor, in run()
  /// and backward_step(): between couplings of one split_dim halves are not
  /// joined (Note [Streams of a sequence], rule 1).
  virtual std::optional<int64_t> takes_halves_of() const {
    return std::nullopt;
  }

  /// Whether it takes the halves of this dimension as well, though one whole
  /// tensor would do: what works on each entry of the dimension by itself does
  /// not ask for them to be joined.
  virtual bool takes_halves_along(int64_t /*dim*/) const {
    return false;
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
    std::vector<at::Tensor> rebuilt =
        run_with(back, after.outputs, RunExtras{after.conditions}, recording);
    detail::check_rebuilt(
        type_name(),
        name_of(direction),
        name_of(back),
        rebuilt,
        kept,
        recording.inputs());
    return detail::kept_or(kept, std::move(rebuilt));
  }

  /// Stops where a run is given conditions of another number than it takes, or
  /// asked for a log-determinant that is not known.
  void check_extras(Direction direction, const RunExtras& extras) const {
    const auto expected = condition_count();
    TORCH_CHECK_VALUE(
        !expected || extras.conditions.size() == *expected,
        type_name(),
        "::",
        name_of(direction),
        "(): expected ",
        expected.value_or(0),
        " conditions, but got ",
        extras.conditions.size(),
        ". Pass as many to given({...}) as its branches take beside the half.");
    for (const at::Tensor& condition : extras.conditions) {
      TORCH_CHECK_VALUE(
          condition.defined(),
          type_name(),
          "::",
          name_of(direction),
          "(): expected tensors as conditions, but got an undefined one. Pass "
          "an empty tensor instead.");
    }
    TORCH_CHECK_VALUE(
        extras.log_det == nullptr || log_det() != LogDet::kUnknown,
        type_name(),
        "::",
        name_of(direction),
        "_with_log_det(): expected a module with a log-determinant, but got one "
        "that has none. Give it forward_with_log_det() and "
        "inverse_with_log_det(), or derive it from memcnn::PreservesVolume if "
        "it keeps volumes.");
  }

 private:
  /// The run once more, with the graph of the arguments: the inputs, and then
  /// the conditions.
  void run_again(
      Direction direction,
      const AfterRun& after,
      detail::LocalRun& again,
      Recording& recording) {
    const at::TensorList arguments = again.arguments;
    const size_t inputs = arguments.size() - after.conditions.size();
    std::optional<detail::LogDetSum> log_det;
    if (after.has_log_det) {
      log_det.emplace(arguments[0]);
    }
    again.outputs = run_with(
        direction,
        arguments.slice(0, inputs).vec(),
        RunExtras{arguments.slice(inputs), log_det ? &*log_det : nullptr},
        recording);
    if (log_det) {
      again.outputs.push_back(log_det->take());
    }
  }
};

} // namespace memcnn
