// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/local_run.h>
#include <memcnn/detail/saved_tensors.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/parameter_gradients.h>
#include <memcnn/recording.h>

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <utility>

namespace memcnn::detail {

/// A run that kept its graph: its arguments, and its outputs with that graph.
struct KeptRun {
  /// What is kept of the run that a recording is of; null where nothing is.
  static std::shared_ptr<KeptRun>& of(Recording& recording) {
    return recording.kept_run_;
  }

  Tensors arguments; // inputs, and then conditions
  Tensors outputs; // and the log-determinant, where that was asked for
  /// Where the graph does not hold its activations by itself.
  std::shared_ptr<SavedTensors> saved;
};

/// The backward step of a block that kept its graph, and has the activations:
/// nothing runs again.
inline BeforeRun kept_backward_step(
    Invertible& block,
    AfterRun after,
    Recording& recording,
    ParameterGradients& parameters) {
  std::shared_ptr<KeptRun>& stored = KeptRun::of(recording);
  KeptRun kept = after.retain_graph ? *stored : std::move(*stored);
  if (!after.retain_graph) {
    stored.reset();
  }
  after.outputs.clear();
  LocalRun run(
      block.module(),
      std::move(kept.arguments),
      joined(after.needs_grad, after.needs_condition_grad),
      parameters);
  run.outputs = std::move(kept.outputs);

  BeforeRun before;
  for (size_t i = 0; i < after.needs_grad.size(); ++i) {
    before.inputs.push_back(detached(run.arguments[i]));
  }
  const GraphUse use = after.retain_graph ? GraphUse::kRetain : GraphUse::kFree;
  take_gradients(run, std::move(after), use, before);
  return before;
}

} // namespace memcnn::detail
