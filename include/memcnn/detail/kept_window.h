// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/kept_run.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Memory budget]
// ~~~~~~~~~~~~~~~~~~~~
// ReversibleSequenceOptions().memory_budget(bytes) keeps the activations of the
// last blocks that fit, so that these need not run again.
//
// 1. What a block keeps is measured when it runs, by the allocators' own
//    reports. Blocks run with a graph; where the budget is exceeded the oldest
//    kept block gives up its graph, and will be recomputed. From the second
//    step of a kind on, blocks that will not fit run without a graph from the
//    start.
// 2. The last blocks are the ones to keep. Blocks of a chain do about the same
//    work per byte, so any of them saves the same time; but backward meets the
//    last ones first, and their memory is gone before the others begin to
//    recompute. The peak is then the larger of what was kept and what a
//    recomputation needs, not the sum. It also makes the choice a matter of
//    sizes alone: the same in every run, which timings would not be.
// 3. Gradients are the same as without a budget, up to the rounding of
//    reconstruction that kept blocks are spared.
// 4. Inside a torch profiler nothing can be measured, since it is asked for by
//    the same means: the choice of an earlier step holds, and without one
//    nothing is kept.

/// How many blocks of a chain fitted into a budget in the last run, which says
/// how many will in another run of its kind (Note [Memory budget], rule 1).
class BudgetPlan {
 public:
  /// All that the memory of a run depends on.
  using Kind = std::tuple<
      Direction,
      /*budget=*/int64_t,
      /*sizes=*/std::vector<int64_t>,
      at::ScalarType,
      /*autocast=*/bool,
      /*training=*/bool,
      /*blocks=*/size_t>;

  static Kind kind_of(
      Direction direction,
      int64_t budget,
      const at::Tensor& input,
      bool training,
      size_t blocks) {
    return {
        direction,
        budget,
        input.sizes().vec(),
        input.scalar_type(),
        is_autocast_on(input.device()),
        training,
        blocks};
  }

  /// From which block on blocks are worth keeping, in the order of their run: 0
  /// where the last run was of another kind.
  size_t first_kept(Kind kind) {
    if (kind != kind_) {
      kind_ = std::move(kind);
      first_kept_ = 0;
    }
    return first_kept_;
  }

  /// What the run of that kind came to.
  void set_first_kept(size_t block) {
    first_kept_ = block;
  }

 private:
  std::optional<Kind> kind_;
  size_t first_kept_ = 0;
};

/// The blocks of a chain that keep their activations within a budget of bytes:
/// always the last ones that fit (Note [Memory budget], rule 2).
class KeptWindow {
 public:
  /// Blocks before the given number are known not to fit in the end.
  KeptWindow(int64_t budget, size_t first)
      : budget_(budget),
        is_measured_(AllocationMeter::is_available()),
        skip_(
            is_measured_ || first > 0 ? first
                                      : (std::numeric_limits<size_t>::max)()) {}

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
    auto kept = std::make_shared<KeptRun>();
    int64_t argument_bytes = 0;
    for (at::Tensor& input : inputs) {
      argument_bytes += static_cast<int64_t>(input.nbytes());
      kept->arguments.push_back(input.detach().requires_grad_());
      input.reset();
    }
    const int64_t added_bytes =
        run_with_graph(block, direction, *kept, recording);
    Tensors outputs;
    for (const at::Tensor& output : kept->outputs) {
      outputs.push_back(output.detach());
    }
    KeptRun::of(recording) = std::move(kept);
    blocks_.push_back({&recording, argument_bytes, added_bytes});
    bytes_ += added_bytes;
    make_room();
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

  /// Returns the bytes that the run added.
  int64_t run_with_graph(
      Invertible& block,
      Direction direction,
      KeptRun& kept,
      Recording& recording) const {
    // Inside a torch profiler nothing can be measured: then the plan of an
    // earlier run holds, and without one nothing is kept.
    std::optional<AllocationMeter> added;
    if (is_measured_) {
      added.emplace();
    }
    const at::AutoGradMode with_graph(true);
    kept.outputs = block.run(direction, kept.arguments, recording);
    return added ? added->held_bytes() : 0;
  }

  void make_room() {
    // Arguments are results of the block before, where that one is kept.
    while (!blocks_.empty() &&
           blocks_.front().argument_bytes + bytes_ > budget_) {
      bytes_ -= blocks_.front().bytes;
      KeptRun::of(*blocks_.front().recording).reset();
      blocks_.pop_front();
    }
  }

  int64_t budget_;
  bool is_measured_;
  size_t skip_;
  int64_t bytes_ = 0;
  std::deque<Block> blocks_;
};

} // namespace memcnn::detail
