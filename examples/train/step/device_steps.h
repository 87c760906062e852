// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/exact_range.h>

#include "revnet/captured_step.h"
#include "train/data/batches.h"
#include "train/data/device_batches.h"
#include "train/libtorch/run_ahead.h"
#include "train/step/device_tally.h"
#include "train/step/learner.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"
#include "train/step/steps.h"
#include "train/step/stopwatch.h"

#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace training {

/// The steps of a GPU: all of a step, from the bytes of its images to the sums
/// that a row of the log shows, is work of the device alone, and where wanted
/// one CUDA graph. The host waits for none of it but in read().
class DeviceSteps final : public Steps {
 public:
  /// With `graph`, steps become replays of a graph where the device has such.
  DeviceSteps(
      Learner& learner,
      DeviceBatches batches,
      memcnn::AllocationMeter& meter,
      bool graph)
      : learner_(learner),
        batches_(std::move(batches)),
        meter_(meter),
        tally_(learner.device()),
        ahead_(learner.device()),
        learn_(
            learner.device(),
            [this](const auto&) {
              learn();
              return revnet::CapturedStep::Tensors();
            },
            revnet::CapturedStepOptions().enabled(graph)) {}

  DeviceSteps(const DeviceSteps&) = delete;
  DeviceSteps& operator=(const DeviceSteps&) = delete;

  void step(int64_t iteration) override {
    if (!watch_) {
      watch_.emplace();
    }
    learner_.prepare_step(iteration);
    batches_.make_next(iteration);
    learn_();
    ahead_.queued();
  }

  /// A replay allocates nothing: its memory is what its capture took.
  ///
  /// Throws:   c10::ValueError if values left the range of the exact mode.
  StepReport read() override {
    memcnn::check_exact_range(learner_.device());
    StepReport report = tally_.read();
    if (watch_) {
      report.sums.milliseconds = watch_->milliseconds();
    }
    report.sums.memory = memory_;
    watch_.reset();
    return report;
  }

  bool run_ahead() const override {
    return true;
  }

  Batch batch(int64_t iteration) override {
    return batches_.at(iteration);
  }

 private:
  /// What a graph captures: no word of the host's may matter to it.
  void learn() {
    const Batch batch = batches_.next();
    learner_.optimizer().zero_grad();
    MemoryWatch memory(meter_, learner_.standing_gradients());
    const torch::Tensor figures = learner_.forward_and_backward(batch, memory);
    learner_.optimizer().step(tally_.add(figures));
    note(memory.use());
  }

  /// Leaves out a GPU's first step: libraries take workspaces in it that they
  /// keep, and cuDNN may try all its algorithms, in whatever memory there is.
  void note(const MemoryUse& use) {
    if (has_learned_ || !learner_.device().is_cuda()) {
      memory_ = use;
    }
    has_learned_ = true;
  }

  Learner& learner_;
  DeviceBatches batches_;
  memcnn::AllocationMeter& meter_;
  DeviceTally tally_;
  RunAhead ahead_;
  MemoryUse memory_; // of the last step that the host ran itself
  bool has_learned_ = false;
  std::optional<Stopwatch> watch_; // since the first step after read()
  revnet::CapturedStep learn_;
};

} // namespace training
