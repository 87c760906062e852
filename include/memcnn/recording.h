// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/module_state.h>
#include <memcnn/detail/tensors.h>

#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <array>
#include <cstddef>
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
//    it.
// 2. Buffers change once per training step. Running statistics of batch and
//    instance normalisation are set aside while a layer runs again: in train
//    mode they are written, never read. Any other buffer that a branch changes
//    in forward is copied before, put back for the second run, and restored
//    after. Statistics after a step equal those of the plain network bit for
//    bit. A buffer that was read in forward and changed by something else
//    before backward is an error.
// 3. Parameters are inputs of the node and their gradients are returned, never
//    accumulated by a nested backward(): torch::autograd::grad, inputs=, hooks,
//    frozen and unused parameters work. A tensor hook on a parameter fires
//    once, on the whole gradient: hooks are taken off for the nested pass.
//    Parameters changed between forward and backward are an error, as in plain
//    autograd. So is a tensor with a gradient that a branch reaches without its
//    being an argument or a registered parameter: its gradient would be lost.
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

namespace detail {
struct KeptRun;
} // namespace detail

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
    return Recording(Mode::kOff, /*preserve_rng_state=*/false);
  }

  /// Records the next run of each branch, until replay_from_here(). Without
  /// preserve_rng_state random numbers are not replayed.
  static Recording start(bool preserve_rng_state) {
    return Recording(Mode::kRecord, preserve_rng_state);
  }

  /// Runs one branch: `call` computes it from `inputs`, `branch` is the module
  /// behind it.
  template <class Fn>
  auto run(
      size_t index,
      torch::nn::Module& branch,
      at::TensorList inputs,
      Fn&& call) {
    switch (mode_) {
      case Mode::kRecord:
        return record(index, branch, device_of(inputs), call);
      case Mode::kReplay:
        return replay(index, branch, call);
      default:
        return call();
    }
  }

  void replay_from_here() {
    mode_ = Mode::kReplay;
    for (const auto& block : blocks_) {
      block->replay_from_here();
    }
  }

  bool is_recording() const {
    return mode_ == Mode::kRecord;
  }

  /// The recording of one block of a chain.
  Recording& block(size_t index) {
    while (blocks_.size() <= index) {
      blocks_.push_back(std::unique_ptr<Recording>(
          new Recording(mode_, preserve_rng_state_)));
    }
    return *blocks_[index];
  }

  /// Notes what the inputs of the recorded run are like (rule 8).
  void note_inputs(at::TensorList inputs) {
    inputs_ = std::vector<detail::TensorMeta>(inputs.begin(), inputs.end());
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

  struct Conditions {
    at::Device device;
    detail::ModuleState module;
    detail::AutocastState autocast;
    // Only where numbers were drawn.
    std::optional<detail::GeneratorState> generators;
  };

  Recording(Mode mode, bool preserve_rng_state)
      : mode_(mode), preserve_rng_state_(preserve_rng_state) {}

  /// Where a branch computes: on the device of an input that is not on the CPU,
  /// if there is one.
  static at::Device device_of(at::TensorList inputs) {
    for (const at::Tensor& input : inputs) {
      if (!input.is_cpu()) {
        return input.device();
      }
    }
    return at::kCPU;
  }

  void set_scope(ReplayScope* scope) {
    scope_ = scope;
    for (const auto& block : blocks_) {
      block->set_scope(scope);
    }
  }

  template <class Fn>
  auto
  record(size_t index, torch::nn::Module& branch, at::Device device, Fn& call) {
    Conditions seen{
        device,
        detail::ModuleState(branch),
        detail::AutocastState::now(device),
        std::nullopt};
    if (preserve_rng_state_) {
      seen.generators = detail::GeneratorState::now(device);
    }
    const detail::AutocastCacheOff cache_off;
    auto value = call();
    seen.module.note_changes();
    if (seen.generators &&
        *seen.generators == detail::GeneratorState::now(device)) {
      seen.generators.reset();
    }
    conditions_.at(index).emplace(std::move(seen));
    return value;
  }

  template <class Fn>
  auto replay(size_t index, torch::nn::Module& branch, Fn& call) {
    TORCH_CHECK(
        conditions_.at(index).has_value(),
        "memcnn: expected branch ",
        index,
        " to have run in forward, but got no record of it. An Invertible runs "
        "each of its branches once, through Recording::run().");
    const Conditions& seen = *conditions_[index];
    auto state =
        std::make_unique<detail::ModuleStateGuard>(branch, seen.module);
    if (scope_ != nullptr) {
      scope_->states_.push_back(std::move(state));
    }
    const detail::AutocastGuard autocast(seen.device);
    const detail::AutocastCacheOff cache_off;
    seen.autocast.restore();
    if (!seen.generators) {
      return call();
    }
    const detail::GeneratorGuard generators(seen.device);
    seen.generators->restore();
    return call();
  }

  Mode mode_;
  bool preserve_rng_state_;
  std::array<std::optional<Conditions>, kMaxBranches> conditions_;
  std::vector<detail::TensorMeta> inputs_;
  std::vector<std::unique_ptr<Recording>> blocks_;
  std::shared_ptr<detail::KeptRun> kept_run_; // within a memory budget
  ReplayScope* scope_ = nullptr;
};

} // namespace memcnn
