// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "train/data/batches.h"
#include "train/data/prepared_batches.h"
#include "train/step/figures.h"
#include "train/step/learner.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"
#include "train/step/steps.h"
#include "train/step/stopwatch.h"

#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <utility>

namespace training {

/// The steps of a CPU: each is done when step() returns, and another thread
/// prepares the next batch meanwhile.
class HostSteps final : public Steps {
 public:
  HostSteps(
      Learner& learner,
      TrainingBatches batches,
      at::MemoryFormat format,
      memcnn::AllocationMeter& meter)
      : learner_(learner),
        batches_(std::move(batches)),
        format_(format),
        meter_(meter) {}

  void step(int64_t iteration) override {
    const Stopwatch watch;
    learner_.prepare_step(iteration);
    const Batch batch = this->batch(iteration);
    learner_.optimizer().zero_grad();

    StepSums sums;
    sums.data_milliseconds = watch.milliseconds();
    MemoryWatch memory(meter_, learner_.standing_gradients());
    const torch::Tensor figures = learner_.forward_and_backward(batch, memory);
    sums.loss = figures[0].item<double>();
    if (report_.bad_loss || !std::isfinite(sums.loss)) {
      report_.bad_loss = report_.bad_loss.value_or(sums.loss);
      return;
    }
    learner_.optimizer().step();
    sums.steps = 1;
    sums.hits = hits_of(figures);
    sums.memory = memory.use();
    sums.milliseconds = watch.milliseconds();
    report_.sums += sums;
  }

  StepReport read() override {
    return std::exchange(report_, StepReport());
  }

  bool run_ahead() const override {
    return false;
  }

  Batch batch(int64_t iteration) override {
    const Batch& batch = batches_.at(iteration);
    return {batch.images.contiguous(format_), batch.labels};
  }

 private:
  Learner& learner_;
  PreparedBatches batches_;
  at::MemoryFormat format_;
  memcnn::AllocationMeter& meter_;
  StepReport report_;
};

} // namespace training
