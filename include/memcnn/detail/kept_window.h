// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/detail/gradient.h>
#include <memcnn/detail/recording.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The blocks of a chain that keep their activations within a budget of bytes:
/// always the last ones that fit.
///
/// What a block keeps is measured when it runs. Blocks of a chain do about the
/// same work per byte; the last ones are the best to keep since backward meets
/// them first: their memory is gone before the others begin to recompute, so
/// that the peak of the step is what was kept or what a recomputation needs,
/// and not the sum of both.
class KeptWindow {
 public:
  /// Blocks before the given number are known not to fit in the end.
  KeptWindow(int64_t budget, size_t first)
      : budget_(budget),
        is_measured_(AllocationMeter::is_available()),
        skip_(
            is_measured_ || first > 0 ? first
                                      : std::numeric_limits<size_t>::max()) {}

  /// Runs the next block and keeps what it can; the oldest kept blocks make
  /// room.
  Tensors run(
      Invertible& block,
      Direction direction,
      Tensors inputs,
      Recording& recording) {
    if (skip_ > 0) {
      --skip_;
      return block.run(direction, std::move(inputs), recording);
    }
    Recording::KeptRun kept;
    int64_t argument_bytes = 0;
    for (at::Tensor& input : inputs) {
      argument_bytes += static_cast<int64_t>(input.nbytes());
      kept.arguments.push_back(input.detach().requires_grad_());
      input.reset();
    }
    int64_t added_bytes = 0;
    {
      // Inside a torch profiler nothing can be measured: then the plan of an
      // earlier run holds, and without one nothing is kept.
      std::optional<AllocationMeter> added;
      if (is_measured_) {
        added.emplace();
      }
      const at::AutoGradMode with_graph(true);
      kept.outputs = block.run(direction, kept.arguments, recording);
      added_bytes = added ? added->held_bytes() : 0;
    }
    Tensors outputs;
    for (const at::Tensor& output : kept.outputs) {
      outputs.push_back(output.detach());
    }
    recording.kept.emplace(std::move(kept));
    blocks_.push_back({&recording, argument_bytes, added_bytes});
    bytes_ += blocks_.back().bytes;
    // Arguments are results of the block before, where that one is kept.
    while (!blocks_.empty() &&
           blocks_.front().argument_bytes + bytes_ > budget_) {
      bytes_ -= blocks_.front().bytes;
      blocks_.front().recording->kept.reset();
      blocks_.pop_front();
    }
    return outputs;
  }

  /// Whether what is kept was measured, and not taken from a plan.
  bool is_measured() const {
    return is_measured_;
  }

  /// How many blocks are kept.
  size_t size() const {
    return blocks_.size();
  }

 private:
  struct Block {
    Recording* recording;
    int64_t argument_bytes;
    int64_t bytes; // what its run added
  };

  int64_t budget_;
  bool is_measured_;
  size_t skip_;
  int64_t bytes_ = 0;
  std::deque<Block> blocks_;
};

/// The backward step of a block that kept its activations: nothing runs again.
inline BackwardOutput kept_backward_step(
    Invertible& block,
    BackwardInput given,
    Recording& recording,
    ParameterGradients& parameters) {
  Recording::KeptRun kept;
  if (given.retain_graph) {
    kept = *recording.kept;
  } else {
    kept = std::move(*recording.kept);
    recording.kept.reset();
  }
  given.outputs.clear();
  const GraphUse use = given.retain_graph ? GraphUse::kRetain : GraphUse::kFree;
  BackwardOutput result;
  for (const at::Tensor& argument : kept.arguments) {
    result.inputs.push_back(argument.detach());
  }
  result.grad_inputs = differentiate_run(
      block.module(),
      kept.arguments,
      std::move(kept.outputs),
      std::move(given),
      parameters,
      use);
  return result;
}

} // namespace memcnn::detail
