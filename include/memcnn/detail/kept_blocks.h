// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/kept_choice.h>
#include <memcnn/detail/kept_run.h>
#include <memcnn/detail/run_results.h>
#include <memcnn/detail/tensors.h>
#include <memcnn/invertible.h>
#include <memcnn/kept_activations.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn::detail {

// Note [Memory budget]
// ~~~~~~~~~~~~~~~~~~~~
// ReversibleSequenceOptions().memory_budget(bytes) keeps what saves the most work
// of second runs for each byte: results of dear operators (Note [Kept results]),
// and whole blocks, which need not run again.
//
// 1. What a block keeps is measured when it runs, by the allocators' own
//    reports. In the first step of a kind every block runs with a graph, and its
//    results are kept beside it; where the budget is exceeded the least worth is
//    given up: a block its graph, and then its results one by one. From the
//    second step of a kind on, blocks keep from the start what was left.
// 2. Worth are the multiply-adds of a second run that are spared for each byte.
//    A result spares those of its operator. A whole block spares beyond its
//    results what all its other operators do: they are bound by memory, and a
//    byte that they save stands for a few multiply-adds (kMultiplyAddsPerByte).
//    Of what is worth the same the last is kept: backward meets it first. So the
//    choice is a matter of sizes alone, the same in every run.
// 3. Gradients are the same as without a budget, up to the rounding of
//    reconstruction that kept blocks and results are spared.
// 4. Inside a torch profiler nothing can be measured, since it is asked for by
//    the same means: the choice of an earlier step holds, and without one results
//    alone are kept, whose bytes are known.
// 5. The segments of checkpoint_sequential(), and the module of checkpoint() with
//    its results alone, know of no earlier step. They choose while they run, by
//    the bytes that were saved until then, of which a result and a graph may
//    share some: never more are kept. A segment that still runs pushes out whole
//    ones, but no results. A result that the graph does not have itself is kept
//    beside it if it would outlast it.

/// What each block of a chain keeps, as an earlier run of its kind found.
class BudgetPlan {
 public:
  struct Block {
    bool keeps_results() const {
      return std::find(results.begin(), results.end(), true) != results.end();
    }

    bool is_whole = false;
    RunResults::Which results; // if it is not whole
    double multiply_adds = 0; // of all its dear operators
  };
  using Blocks = std::vector<Block>; // in the order of a run
  /// All that the memory of a run depends on.
  using Kind = std::tuple<
      Direction,
      /*budget=*/int64_t,
      /*sizes=*/std::vector<int64_t>,
      at::ScalarType,
      /*autocast=*/bool,
      /*training=*/bool,
      /*trained_parameters=*/size_t,
      /*blocks=*/size_t>;

  static Kind kind_of(
      Direction direction,
      int64_t budget,
      const at::Tensor& input,
      bool training,
      size_t trained_parameters,
      size_t blocks) {
    return {
        direction,
        budget,
        input.sizes().vec(),
        input.scalar_type(),
        is_autocast_on(input.device()),
        training,
        trained_parameters,
        blocks};
  }

  BudgetPlan() = default;
  /// A copy finds its own.
  BudgetPlan(const BudgetPlan& /*other*/) {}
  BudgetPlan& operator=(const BudgetPlan& /*other*/) {
    return *this;
  }

  /// Empty where the last run was of another kind.
  std::shared_ptr<const Blocks> blocks(const Kind& kind) {
    const std::lock_guard lock(mutex_);
    if (kind != kind_) {
      kind_ = kind;
      blocks_ = std::make_shared<const Blocks>();
    }
    return blocks_;
  }

  /// What a run kept that went by the blocks `before`, and what the next one may
  /// go by. If another thread's run was of another kind since, it has to plan.
  void set(
      const KeptActivations& kept,
      const std::shared_ptr<const Blocks>& before,
      std::optional<Blocks> blocks) {
    const std::lock_guard lock(mutex_);
    kept_ = kept;
    if (blocks && before == blocks_) {
      blocks_ = std::make_shared<const Blocks>(std::move(*blocks));
    }
  }

  /// What the last run kept.
  KeptActivations kept() const {
    const std::lock_guard lock(mutex_);
    return kept_;
  }

 private:
  mutable std::mutex mutex_; // several threads may run one sequence
  std::optional<Kind> kind_;
  std::shared_ptr<const Blocks> blocks_;
  KeptActivations kept_;
};

/// What the blocks of a chain keep in one run, within a budget of bytes (Note
/// [Memory budget]).
class KeptBlocks {
 public:
  /// As planned, if there is a plan.
  KeptBlocks(int64_t budget, std::shared_ptr<const BudgetPlan::Blocks> plan)
      : choice_(budget),
        plan_(std::move(plan)),
        is_measured_(AllocationMeter::is_available()) {}

  /// Runs the next block and keeps of it what it can; others make room.
  Tensors run(
      Invertible& block,
      Direction direction,
      Tensors inputs,
      const RunExtras& extras,
      Recording& recording) {
    const size_t k = blocks_.size();
    const BudgetPlan::Block* plan = planned(k);
    Block& kept =
        blocks_.emplace_back(recording, plan ? &plan->results : nullptr);
    const bool keeps = plan == nullptr || plan->keeps_results();
    recording.keep_results(keeps ? &kept.results : nullptr);
    Tensors outputs;
    if (plan ? plan->is_whole : is_measured_) {
      outputs = run_whole(k, block, direction, std::move(inputs), extras);
    } else {
      outputs = block.run_with(direction, std::move(inputs), extras, recording);
      kept.results.enter(choice_, k);
    }
    choice_.make_room();
    return outputs;
  }

  /// All blocks have run. What a graph has needs not be kept beside it.
  void end() {
    for (Block& block : blocks_) {
      if (block.is_whole) {
        block.results.let_go();
      }
    }
  }

  /// What this run goes by.
  const std::shared_ptr<const BudgetPlan::Blocks>& plan_before() const {
    return plan_;
  }

  /// What the next run of the kind may go by, once all blocks have run. Nothing
  /// if this one was not measured.
  std::optional<BudgetPlan::Blocks> plan() const {
    if (!is_measured_) {
      return std::nullopt;
    }
    BudgetPlan::Blocks plan;
    for (size_t k = 0; k < blocks_.size(); ++k) {
      plan.push_back({blocks_[k].is_whole, {}, multiply_adds(k)});
      if (!plan[k].is_whole) {
        plan[k].results = is_as_planned(k)
            ? blocks_[k].results.which_are_kept()
            : RunResults::Which(blocks_[k].results.size(), true);
      }
    }
    return plan;
  }

  KeptActivations kept() const {
    KeptActivations kept;
    kept.bytes = choice_.bytes();
    for (size_t k = 0; k < blocks_.size(); ++k) {
      kept.multiply_adds += multiply_adds(k);
      if (blocks_[k].is_whole) {
        ++kept.blocks;
        kept.spared += multiply_adds(k);
      } else {
        const RunResults::Sums results = blocks_[k].results.kept();
        kept.results += results.count;
        kept.spared += results.multiply_adds;
      }
    }
    return kept;
  }

 private:
  struct Block {
    Block(Recording& recording_, const RunResults::Which* known)
        : recording(recording_), results(known) {}

    Recording& recording;
    RunResults results;
    bool is_whole = false;
    int64_t argument_bytes = 0; // if it is whole
    int64_t bytes = 0; // likewise: what its run added
  };

  /// Null where there is no plan.
  const BudgetPlan::Block* planned(size_t k) const {
    return plan_->empty() ? nullptr : &(*plan_)[k];
  }

  /// Whether it called as many dear operators as planned. Without a graph others
  /// may run than with one, and parts of it may be in another mode now: the next
  /// run finds out anew which of its results are worth most.
  bool is_as_planned(size_t k) const {
    const BudgetPlan::Block* plan = planned(k);
    return plan == nullptr || !plan->keeps_results() ||
        plan->results.size() == blocks_[k].results.size();
  }

  double multiply_adds(size_t k) const {
    const BudgetPlan::Block* plan = planned(k);
    return plan != nullptr && is_as_planned(k)
        ? plan->multiply_adds
        : blocks_[k].results.multiply_adds();
  }

  /// With a graph, which is kept. Results that the graph has as well cost
  /// nothing, others are not needed beside it.
  Tensors run_whole(
      size_t k,
      Invertible& block,
      Direction direction,
      Tensors inputs,
      const RunExtras& extras) {
    auto run = std::make_shared<KeptRun>();
    Block& kept = blocks_[k];
    for (at::Tensor& input : inputs) {
      kept.argument_bytes += static_cast<int64_t>(input.nbytes());
      run->arguments.push_back(input.detach().requires_grad_());
      input.reset();
    }
    for (const at::Tensor& condition : extras.conditions) {
      run->arguments.push_back(condition.detach());
      if (is_differentiable(condition)) {
        run->arguments.back().requires_grad_();
      }
    }
    const int64_t added =
        run_with_graph(block, direction, *run, extras, kept.recording);
    Tensors outputs;
    for (const at::Tensor& output : run->outputs) {
      outputs.push_back(output.detach());
    }
    if (extras.log_det != nullptr) {
      extras.log_det->add(outputs.back());
      outputs.pop_back();
    }
    KeptRun::of(kept.recording) = std::move(run);
    kept.is_whole = true;
    kept.bytes = added - kept.results.let_go_unshared();
    choice_.add(
        worth_of_graph(kept.bytes, kept.results),
        bytes_of_whole(k),
        k,
        [this, k] { return give_up_graph(k); });
    return outputs;
  }

  /// Returns the bytes that the run added.
  int64_t run_with_graph(
      Invertible& block,
      Direction direction,
      KeptRun& run,
      const RunExtras& extras,
      Recording& recording) const {
    const at::TensorList arguments = run.arguments;
    const size_t inputs = arguments.size() - extras.conditions.size();
    std::optional<AllocationMeter> added;
    if (is_measured_) {
      added.emplace();
    }
    const at::AutoGradMode with_graph(true);
    // A sum of its own, since it has a graph.
    std::optional<LogDetSum> log_det;
    if (extras.log_det != nullptr) {
      log_det.emplace(arguments[0]);
    }
    run.outputs = block.run_with(
        direction,
        arguments.slice(0, inputs).vec(),
        RunExtras{arguments.slice(inputs), log_det ? &*log_det : nullptr},
        recording);
    if (log_det) {
      run.outputs.push_back(log_det->take());
    }
    return added ? added->held_bytes() : 0;
  }

  /// Arguments are results of the block before, where that one is whole.
  int64_t bytes_of_whole(size_t k) const {
    return blocks_[k].bytes + (is_whole(k - 1) ? 0 : blocks_[k].argument_bytes);
  }

  /// None of these is before the first, or after the last one.
  bool is_whole(size_t k) const {
    return k < blocks_.size() && blocks_[k].is_whole;
  }

  /// Its results are still there.
  int64_t give_up_graph(size_t k) {
    Block& block = blocks_[k];
    KeptRun::of(block.recording).reset();
    const int64_t bytes = bytes_of_whole(k);
    block.is_whole = false;
    block.results.enter(choice_, k);
    return bytes - (is_whole(k + 1) ? blocks_[k + 1].argument_bytes : 0);
  }

  KeptChoice choice_;
  std::shared_ptr<const BudgetPlan::Blocks> plan_;
  bool is_measured_;
  std::deque<Block> blocks_;
};

} // namespace memcnn::detail
