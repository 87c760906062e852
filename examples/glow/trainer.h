// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "glow/batches.h"
#include "glow/config.h"
#include "glow/glow.h"
#include "glow/learner.h"
#include "train/data/images.h"
#include "train/step/memory_use.h"
#include "train/step/parameters.h"
#include "train/step/step_result.h"
#include "train/step/stopwatch.h"
#include "train/team/alone.h"
#include "train/team/team.h"
#include "train/weights/state_dict.h"

#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

namespace glow {

/// What the test images have to tell.
struct Evaluation {
  double bits_per_dim = 0; // mean over the images
  RoundTrip round_trip; // of the first of them
};

/// A flow, its optimizer and its data: all that training touches.
class Trainer final {
 public:
  /// The meter must count the memory of `device`, and outlive the trainer.
  Trainer(
      const Config& config,
      const training::DataSet& data,
      torch::Device device,
      memcnn::AllocationMeter& meter)
      : config_(config),
        device_(device),
        meter_(meter),
        batches_(config, data, device),
        learner_(config, device) {
    learner_.initialize(batches_.at(0));
  }

  /// Learns from the batch of an iteration. A loss that is not finite changes no
  /// weights, nor does any after it.
  void step(int64_t iteration) {
    const training::Stopwatch watch;
    const torch::Tensor images = batches_.at(iteration);
    learner_.zero_grad();

    training::StepSums sums;
    sums.data_milliseconds = watch.milliseconds();
    training::MemoryWatch memory(meter_, /*standing_gradients=*/0);
    const torch::Tensor loss = learner_.bits(images).mean();
    memory.note_end_of_forward();
    loss.backward();
    sums.loss = loss.item<double>();
    if (report_.bad_loss || !std::isfinite(sums.loss)) {
      report_.bad_loss = report_.bad_loss.value_or(sums.loss);
      return;
    }
    learner_.update(iteration);
    sums.steps = 1;
    sums.memory = memory.use();
    sums.milliseconds = watch.milliseconds();
    report_.sums += sums;
  }

  /// What the steps since the last call have to tell.
  training::StepReport read() {
    return std::exchange(report_, training::StepReport());
  }

  bool runs_ahead() const {
    return false;
  }

  /// On the test images. `go_on` is told the share done; where it returns false,
  /// nothing is returned.
  std::optional<Evaluation> evaluate(const std::function<bool(double)>& go_on) {
    const torch::NoGradGuard no_grad;
    const int64_t count = batches_.test_images();
    Evaluation evaluation;
    for (int64_t first = 0; first < count; first += kTestBatch) {
      if (!go_on(static_cast<double>(first) / static_cast<double>(count))) {
        return std::nullopt;
      }
      evaluation.bits_per_dim +=
          learner_.bits(batches_.test(first, kTestBatch)).sum().item<double>();
    }
    evaluation.bits_per_dim /= static_cast<double>(count);
    evaluation.round_trip =
        round_trip(learner_.model(), batches_.test(0, kTestBatch));
    return evaluation;
  }

  /// New images, (count, 3, 32, 32), uint8, on the CPU: of the same latents each
  /// time, so that one can see how they change.
  torch::Tensor sample(int64_t count) {
    const torch::Tensor images = learner_.model()->sample(
        count,
        config_.temperature,
        generator_for(config_, Purpose::kSamples, /*moment=*/0));
    return quantise(images, config_.learn_bits).cpu();
  }

  bool weights_are_finite() {
    return training::all_finite(*learner_.model());
  }

  int64_t parameter_count() {
    return training::count_of_parameters(*learner_.model());
  }

  int64_t parameter_bytes() {
    return training::bytes_of_parameters(*learner_.model());
  }

  training::StateDict learned_tensors() {
    return learner_.learned_tensors();
  }

  torch::Device device() const {
    return device_;
  }

  training::Team& team() const {
    return training::alone();
  }

 private:
  static constexpr int64_t kTestBatch = 100;

  Config config_;
  torch::Device device_;
  memcnn::AllocationMeter& meter_;
  Batches batches_;
  Learner learner_;
  training::StepReport report_;
};

} // namespace glow
