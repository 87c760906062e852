// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/first_run.h>
#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/kept_results.h>
#include <memcnn/detail/layout.h>
#include <memcnn/detail/module_state.h>
#include <memcnn/detail/read_tensors.h>
#include <memcnn/detail/tensors.h>

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/module.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace memcnn {

// Note [Recomputation]
// ~~~~~~~~~~~~~~~~~~~~
// What backward may rely on, and what it leaves as it was, whatever runs again.
//
// 1. What runs again in backward sees what forward saw: the same autocast state
//    per device, the same random numbers (noted for F and for G apart, since
//    they are replayed in the other order; CPU and device generators), train or
//    eval mode of every part. The caller's own generator and autocast state are
//    left as found. A generator's state is kept only where the branch drew from
//    it; each of its draws has to go on from the state from which it went on in
//    forward, or backward stops: another thread drew in between.
// 2. What parameters() and buffers() list changes once per training step,
//    whether it needs a gradient or not. A tensor that a branch writes is copied
//    just before (detail/operator_watch.h), gets its value and version back for
//    the second run, and is left as found; the second run has to write what the
//    first wrote. (LibTorch's layers that only compute are not watched:
//    detail/only_computes.h.) Running statistics of batch normalisation that
//    trains are written, never read: they stand still in the second run and need
//    no copy. (A branch that reads them by itself finds those that forward left.)
//    Statistics after a step equal those of the plain network bit for bit. What
//    forward read and something else changed before backward is an error. Where
//    a module is rebuilt by its own inverse, that one sees what forward left.
// 3. Parameters are inputs of the node and their gradients are returned, never
//    accumulated by a nested backward(): torch::autograd::grad, inputs=, hooks,
//    frozen and unused parameters work. A tensor hook on a parameter fires
//    once, on the whole gradient: hooks are taken off for the nested pass.
//    Parameters changed between forward and backward are an error, as in plain
//    autograd, and so are those that a layer reads frozen, and its buffers. So is
//    a tensor with a gradient that a branch reaches without its being an argument
//    or a registered parameter: its gradient would be lost.
// 4. retain_graph and a second backward work. create_graph gives right second
//    derivatives: inputs are rebuilt in value, attached to where the true ones
//    came from, and the module runs again with a graph.
// 5. The autocast weight cache is off while branches run without a graph and
//    while they run again: a cast remembered from the first would lose the
//    weight's gradient in the second.
// 6. Where no graph is recorded nothing is freed, saved or copied: the cost is
//    that of the plain module. Eval mode with a graph saves memory as training
//    does.
// 7. inverse() called by the user counts as one forward for buffers. After
//    backward, unless the graph is retained, the node holds nothing.
// 8. An input that is rebuilt has the sizes, the dtype and the device of the
//    true one, or backward stops.
// 9. A branch's argument is laid out in its second run as in its first, strides
//    of sizes of 1 included, and the gradient of its value as that value:
//    kernels choose by strides in which order they add and draw. Options that
//    change layouts act from the next forward on.
// 10. State that nobody registered (a plain member that forward changes) cannot
//    be seen, and is not restored. With the option debug every second run is
//    compared with the first: its argument, which finds blocks that are not
//    invertible, and its value at the very argument of the first.
// 11. Gradients of a sequence's parameters arrive block by block, the last one's
//    first, before the block in front of it runs again; a pass runs only the
//    blocks that it needs (Note [Nodes of a chain] in detail/chain_nodes.h).

enum class Direction; // invertible.h
namespace detail {
struct KeptRun;
} // namespace detail

/// How a run is recorded.
struct RecordingOptions {
  /// Random numbers are replayed.
  bool preserve_rng_state = true;
  /// Every second run is compared with the first: costs a copy of each branch's
  /// argument and value, and one more run of each branch.
  bool debug = false;
};

/// What the branches of one run of an invertible module saw, so that each can
/// run again alike (Note [Recomputation], rule 1). A chain of blocks has one
/// recording for each block.
///
/// A module runs its branches through run(), once each. Where nothing is to be
/// recomputed that is a plain call; in forward it records; in backward the same
/// call replays, in whatever order the branches come. The caller's autocast
/// settings and generators are as they were after each call.
class Recording {
 public:
  static constexpr size_t kMaxBranches = 2;

  /// Neither records nor replays: branches run as in any module.
  static Recording off() {
    return Recording(Mode::kOff, {});
  }

  /// Records the next run of each branch, until replay_from_here().
  static Recording start(RecordingOptions options) {
    return Recording(Mode::kRecord, options);
  }

  /// Runs one branch: `call` computes it from tensors, `branch` is the module
  /// behind it. In a second run `call` gets `inputs` laid out as in the first
  /// (rule 9).
  template <class Fn>
  auto run(
      size_t index,
      torch::nn::Module& branch,
      std::vector<at::Tensor> inputs,
      Fn&& call) {
    switch (mode_) {
      case Mode::kRecord:
        return record(index, branch, inputs, call, /*keep_after=*/false);
      case Mode::kReplay:
        return replay(index, branch, std::move(inputs), call);
      default:
        return call(inputs);
    }
  }

  /// Runs one of the two maps of a module that is a branch as a whole: map 0
  /// and map 1 undo each other, and one of them is recorded. In backward the
  /// other one runs in the state that the recorded one left.
  template <class Fn>
  auto run_map(
      size_t map,
      torch::nn::Module& module,
      std::vector<at::Tensor> inputs,
      Fn&& call) {
    if (mode_ == Mode::kRecord) {
      return record(map, module, inputs, call, /*keep_after=*/true);
    }
    if (mode_ == Mode::kReplay && !conditions_.at(map)) {
      return replay_as(recorded(1 - map), module, inputs, call, Moment::kAfter);
    }
    return run(map, module, std::move(inputs), call);
  }

  /// Says that a layer reads its own parameters and buffers, outside of any
  /// branch. In forward it notes them, in backward it stops where they have
  /// changed (rule 3).
  void read(const torch::nn::Module& layer) {
    if (mode_ == Mode::kRecord) {
      read_.note(layer);
    } else if (mode_ == Mode::kReplay) {
      read_.check(layer);
    }
  }

  /// Results of dear operators of the next run are kept, as the keeper says
  /// (Note [Kept results]); it is asked until replay_from_here().
  void keep_results(detail::ResultKeeper* keeper) {
    keeper_ = keeper;
    for (const auto& block : blocks_) {
      block->keep_results(keeper);
    }
  }

  /// Lets them go.
  void let_go_results() {
    for (auto& seen : conditions_) {
      if (seen && seen->results) {
        seen->results->let_go();
      }
    }
    for (const auto& block : blocks_) {
      block->let_go_results();
    }
  }

  void replay_from_here() {
    mode_ = Mode::kReplay;
    keeper_ = nullptr;
    for (const auto& block : blocks_) {
      block->replay_from_here();
    }
  }

  /// Said while a branch runs: in the first run that a second one may end here,
  /// in a second run that it does, and what it did so far is all that counts.
  void note_stop() {
    note_stop_();
  }

  bool is_recording() const {
    return mode_ == Mode::kRecord;
  }

  const RecordingOptions& options() const {
    return options_;
  }

  /// The recording of one block of a chain.
  Recording& block(size_t index) {
    while (blocks_.size() <= index) {
      blocks_.push_back(
          std::unique_ptr<Recording>(new Recording(mode_, options_)));
      blocks_.back()->keeper_ = keeper_;
    }
    return *blocks_[index];
  }

  /// Notes what the inputs of the recorded run are like (rule 8).
  void note_inputs(at::TensorList inputs) {
    inputs_ = std::vector<detail::TensorMeta>(inputs.begin(), inputs.end());
  }

  /// Notes which way the recorded run of a chain went.
  void note_direction(Direction direction) {
    direction_ = direction;
  }

  /// As it was noted; none where nobody did.
  std::optional<Direction> direction() const {
    return direction_;
  }

  /// Notes what the recorded run took: the halves of a dimension, or one whole.
  void note_split_dim(std::optional<int64_t> dim) {
    split_dim_ = dim;
  }

  std::optional<int64_t> split_dim() const {
    return split_dim_;
  }

  /// Keeps what the recorded run returned: an anchor, from which backward goes on
  /// instead of from what it rebuilt until there.
  void keep_outputs(std::vector<at::Tensor> outputs) {
    outputs_ = std::move(outputs);
  }

  /// Those, for one backward pass; `rebuilt` where none were kept.
  std::vector<at::Tensor> outputs_or(
      std::vector<at::Tensor> rebuilt,
      bool retain_graph) {
    if (outputs_.empty()) {
      return rebuilt;
    }
    return retain_graph ? outputs_ : std::exchange(outputs_, {});
  }

  /// Notes in which memory format the halves of a chain travel.
  void note_format(std::optional<at::MemoryFormat> format) {
    format_ = format;
  }

  std::optional<at::MemoryFormat> format() const {
    return format_;
  }

  /// As they were noted; empty where nobody noted them.
  const std::vector<detail::TensorMeta>& inputs() const {
    return inputs_;
  }

  /// While it lives, modules that were replayed stay in their recorded state:
  /// a graph that the replay built may refer to their buffers.
  class ReplayScope {
   public:
    explicit ReplayScope(Recording& recording) : recording_(recording) {
      recording_.set_scope(this);
    }
    ReplayScope(const ReplayScope&) = delete;
    ReplayScope& operator=(const ReplayScope&) = delete;
    ~ReplayScope() {
      recording_.set_scope(nullptr);
      // A module that ran twice found its first recorded state the second time:
      // last in, first out.
      while (!states_.empty()) {
        states_.pop_back();
      }
    }

   private:
    friend class Recording;
    Recording& recording_;
    std::vector<std::unique_ptr<detail::ModuleStateGuard>> states_;
  };

 private:
  friend struct detail::KeptRun;

  enum class Mode { kOff, kRecord, kReplay };
  using Moment = detail::ModuleStateGuard::Moment;

  struct Conditions {
    Conditions(
        at::Device device_,
        torch::nn::Module& branch,
        const std::vector<at::Tensor>& inputs_)
        : device(device_),
          module(branch),
          autocast(detail::AutocastState::now(device)),
          inputs(inputs_.begin(), inputs_.end()) {}

    at::Device device;
    detail::ModuleState module;
    detail::AutocastState autocast;
    std::vector<detail::TensorMeta> inputs;
    // Only where numbers were drawn: the states before, and after in short.
    std::unique_ptr<const detail::GeneratorState> generators;
    uint64_t generators_after = 0;
    std::shared_ptr<detail::KeptResults> results; // where a keeper was asked
    std::optional<detail::FirstRun> first_run; // in debug mode
  };

  Recording(Mode mode, RecordingOptions options)
      : mode_(mode), options_(options) {}

  void set_scope(ReplayScope* scope) {
    scope_ = scope;
    for (const auto& block : blocks_) {
      block->set_scope(scope);
    }
  }

  template <class Fn>
  auto record(
      size_t index,
      torch::nn::Module& branch,
      const std::vector<at::Tensor>& inputs,
      Fn& call,
      bool keep_after) {
    const at::Device device = detail::compute_device_of(inputs);
    Conditions seen(device, branch, inputs);
    std::optional<detail::GeneratorState> generators;
    if (options_.preserve_rng_state) {
      detail::GeneratorState::check_readable(device);
      generators = detail::GeneratorState::now(device);
    }
    if (options_.debug) {
      seen.first_run.emplace(inputs);
    }
    if (keeper_ != nullptr) {
      seen.results = std::make_shared<detail::KeptResults>(branch);
    }
    const detail::AutocastCacheOff cache_off;
    auto compute = [&] {
      std::optional<detail::KeptResults::FirstRun> keeping;
      if (seen.results) {
        keeping.emplace(*seen.results, *keeper_);
      }
      return call(inputs);
    };
    note_stop_ = [&] {
      seen.module.note_stop();
    };
    auto value = seen.module.run(compute, device, keep_after);
    if (generators) {
      note_draws(seen, *generators);
    }
    if (seen.first_run) {
      seen.first_run->set_value(value);
    }
    conditions_.at(index).emplace(std::move(seen));
    return value;
  }

  static void note_draws(
      Conditions& seen,
      const detail::GeneratorState& before) {
    const auto after = detail::GeneratorState::now(seen.device);
    if (seen.module.draws() || !(before == after)) {
      seen.generators = std::make_unique<const detail::GeneratorState>(before);
      seen.generators_after = after.hash();
    }
  }

  template <class Fn>
  auto replay(
      size_t index,
      torch::nn::Module& branch,
      std::vector<at::Tensor> inputs,
      Fn& call) {
    const Conditions& seen = recorded(index);
    detail::lay_out(inputs, seen.inputs);
    if (seen.first_run) {
      seen.first_run->check_inputs(branch, inputs);
      const at::NoGradGuard no_grad;
      seen.first_run->check_value(
          branch,
          replay_as(
              seen, branch, seen.first_run->inputs(), call, Moment::kBefore));
    }
    if (!seen.results) {
      return replay_as(seen, branch, inputs, call, Moment::kBefore);
    }
    auto with_results = [&](const std::vector<at::Tensor>& arguments) {
      // The gradient needs them once.
      detail::KeptResults::SecondRun taking(
          *seen.results,
          branch,
          /*release=*/at::GradMode::is_enabled() &&
              !torch::autograd::get_current_graph_task_keep_graph());
      auto value = call(arguments);
      if (!is_stopped_) {
        taking.end();
      }
      return value;
    };
    return replay_as(seen, branch, inputs, with_results, Moment::kBefore);
  }

  /// Under the conditions of the recorded run, at the given inputs.
  template <class Fn>
  auto replay_as(
      const Conditions& seen,
      torch::nn::Module& branch,
      const std::vector<at::Tensor>& inputs,
      Fn& call,
      Moment moment) {
    auto state =
        std::make_unique<detail::ModuleStateGuard>(branch, seen.module, moment);
    detail::ModuleStateGuard& module = *state;
    if (scope_ != nullptr && at::GradMode::is_enabled()) {
      scope_->states_.push_back(std::move(state));
    }
    const detail::AutocastGuard autocast(seen.device);
    const detail::AutocastCacheOff cache_off;
    seen.autocast.restore();
    auto compute = [&] {
      return call(inputs);
    };
    is_stopped_ = false;
    note_stop_ = [&] {
      module.note_stop();
      is_stopped_ = true;
    };
    if (!seen.generators) {
      return module.run(compute, seen.device);
    }
    const detail::GeneratorGuard generators(seen.device);
    seen.generators->restore();
    auto value = module.run(compute, seen.device);
    if (moment == Moment::kBefore) {
      check_draws(seen, branch, module);
    }
    return value;
  }

  /// Stops where a draw went on from another state than in the first run, as it
  /// does where another thread draws meanwhile. What draws without an operator
  /// that says so has to leave the generator as the first run did, or alone.
  static void check_draws(
      const Conditions& seen,
      const torch::nn::Module& branch,
      const detail::ModuleStateGuard& module) {
    bool alike = module.draws_as_recorded();
    if (!seen.module.draws() && !module.is_stopped()) {
      const auto now = detail::GeneratorState::now(seen.device);
      alike = now.hash() == seen.generators_after || now == *seen.generators;
    }
    TORCH_CHECK(
        alike,
        "memcnn: expected '",
        branch.name(),
        "' to draw in backward the random numbers that it drew in forward, but "
        "got others: another thread drew from the same default generator while "
        "it ran, or it draws differently. Let other threads draw from "
        "generators of their own, or draw outside of the branch.");
  }

  const Conditions& recorded(size_t index) const {
    TORCH_CHECK(
        conditions_.at(index).has_value(),
        "memcnn: expected branch ",
        index,
        " to have run in forward, but got no record of it. An Invertible runs "
        "each of its branches once, through Recording::run().");
    return *conditions_[index];
  }

  Mode mode_;
  RecordingOptions options_;
  std::array<std::optional<Conditions>, kMaxBranches> conditions_;
  detail::ReadTensors read_;
  std::vector<detail::TensorMeta> inputs_;
  std::optional<at::MemoryFormat> format_;
  std::optional<int64_t> split_dim_;
  std::optional<Direction> direction_;
  std::vector<at::Tensor> outputs_; // of an anchor
  std::vector<std::unique_ptr<Recording>> blocks_;
  std::shared_ptr<detail::KeptRun> kept_run_; // within a memory budget
  detail::ResultKeeper* keeper_ = nullptr; // while it records
  ReplayScope* scope_ = nullptr;
  bool is_stopped_ = false; // a second run, early
  std::function<void()> note_stop_; // while a branch runs
};

} // namespace memcnn
