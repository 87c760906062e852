// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/detail/autocast_state.h>
#include <memcnn/detail/generator_state.h>
#include <memcnn/detail/module_state.h>

#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace memcnn::detail {

/// The conditions of every branch of one run of an invertible module, so that
/// each can run again alike (Note [Recomputation], rule 1). A chain of modules
/// has one recording for each stage.
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

  void replay_from_here() {
    mode_ = Mode::kReplay;
    for (const auto& stage : stages_) {
      stage->replay_from_here();
    }
  }

  bool is_recording() const {
    return mode_ == Mode::kRecord;
  }

  /// A run that kept its activations, so that it need not run again: its
  /// arguments, and its outputs with their graph.
  struct KeptRun {
    std::vector<at::Tensor> arguments;
    std::vector<at::Tensor> outputs;
  };
  std::optional<KeptRun> kept;

  /// The recording of one stage of a chain.
  Recording& stage(size_t index) {
    while (stages_.size() <= index) {
      stages_.push_back(std::unique_ptr<Recording>(
          new Recording(mode_, preserve_rng_state_)));
    }
    return *stages_[index];
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
    std::vector<std::unique_ptr<ModuleStateGuard>> states_;
  };

 private:
  enum class Mode { kOff, kRecord, kReplay };

  struct Conditions {
    at::Device device;
    ModuleState module;
    AutocastState autocast;
    std::optional<GeneratorState> generators; // only where numbers were drawn
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
    for (const auto& stage : stages_) {
      stage->set_scope(scope);
    }
  }

  template <class Fn>
  auto
  record(size_t index, torch::nn::Module& branch, at::Device device, Fn& call) {
    Conditions seen{
        device, ModuleState(branch), AutocastState::now(device), std::nullopt};
    if (preserve_rng_state_) {
      seen.generators = GeneratorState::now(device);
    }
    const AutocastCacheOff cache_off;
    auto value = call();
    seen.module.note_changes();
    if (seen.generators && *seen.generators == GeneratorState::now(device)) {
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
    auto state = std::make_unique<ModuleStateGuard>(branch, seen.module);
    if (scope_ != nullptr) {
      scope_->states_.push_back(std::move(state));
    }
    const AutocastGuard autocast(seen.device);
    const AutocastCacheOff cache_off;
    seen.autocast.restore();
    if (!seen.generators) {
      return call();
    }
    const GeneratorGuard generators(seen.device);
    seen.generators->restore();
    return call();
  }

  Mode mode_;
  bool preserve_rng_state_;
  std::array<std::optional<Conditions>, kMaxBranches> conditions_;
  std::vector<std::unique_ptr<Recording>> stages_;
  ReplayScope* scope_ = nullptr;
};

} // namespace memcnn::detail
