// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "train/base/config.h"
#include "train/data/batches.h"
#include "train/data/crops.h"
#include "train/data/device_batches.h"
#include "train/data/device_images.h"
#include "train/data/images.h"
#include "train/data/normalisation.h"
#include "train/data/slice.h"
#include "train/step/device_steps.h"
#include "train/step/evaluate.h"
#include "train/step/host_steps.h"
#include "train/step/learner.h"
#include "train/step/network.h"
#include "train/step/parameters.h"
#include "train/step/step_result.h"
#include "train/step/steps.h"
#include "train/team/alone.h"
#include "train/team/team.h"
#include "train/weights/state_dict.h"

#include <torch/nn.h>
#include <torch/version.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

namespace training {

/// Who makes batches and counts what steps add up to.
enum class StepsOn { kHost, kDevice };

/// Where steps of a device are best off.
inline StepsOn best_for(torch::Device device) {
  return device.is_cpu() ? StepsOn::kHost : StepsOn::kDevice;
}

/// Whether steps on a device are to be CUDA graphs. By themselves only where
/// recomputation can be captured: memcnn's Note [Graph capture], rule 2. Never
/// where processes average gradients, for which the host is needed.
inline bool uses_graph(const Config& config, torch::Device device) {
  constexpr bool kReplaysRandomNumbers = TORCH_VERSION_MAJOR > 2 ||
      (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10);
  return device.is_cuda() && !config.distributed &&
      config.cuda_graph.value_or(kReplaysRandomNumbers);
}

/// A network, its optimizer and its data: all that training touches.
class Trainer {
 public:
  /// The meter must count the memory of `device`; it and the team outlive the
  /// trainer. `steps_on` is for tests: what a GPU does runs on a CPU, too.
  Trainer(
      const Config& config,
      const DataSet& data,
      torch::Device device,
      memcnn::AllocationMeter& meter,
      std::optional<StepsOn> steps_on = std::nullopt,
      Team& team = alone())
      : num_classes_(data.num_classes),
        // A GPU has the room, and waits for the host less often.
        test_batch_(device.is_cpu() ? 200 : 1000),
        normalise_(data.train.pixels),
        test_(data.test, normalise_, device, memory_format_of(config)),
        learner_(config, data.num_classes, device, team),
        steps_(make_steps(
            config,
            data.train,
            meter,
            steps_on.value_or(best_for(device)))) {}

  /// Learns from the batch of an iteration: see Steps.
  void step(int64_t iteration) {
    steps_->step(iteration);
  }

  /// What the steps since the last call have to tell: see Steps.
  StepReport read() {
    return steps_->read();
  }

  bool runs_ahead() const {
    return steps_->run_ahead();
  }

  /// Classifies the test images: see training::evaluate().
  std::optional<Evaluation> evaluate(const std::function<bool(double)>& go_on) {
    return training::evaluate(
        learner_, test_, test_batch_, num_classes_, go_on);
  }

  /// The test images from that one on, as many as evaluate() takes at once.
  Batch test_batch(int64_t first) const {
    return test_.whole(first, test_batch_);
  }

  /// This process' slice of a batch once more, to look into what it did.
  Batch batch(int64_t iteration) {
    return steps_->batch(iteration);
  }

  bool weights_are_finite() const {
    return all_finite(network());
  }

  int64_t parameter_count() const {
    return count_of_parameters(network());
  }

  int64_t parameter_bytes() const {
    return bytes_of_parameters(network());
  }

  /// Parameters, buffers and momentum: the tensors themselves, not copies.
  StateDict learned_tensors() {
    StateDict tensors;
    const torch::NoGradGuard no_grad;
    const auto parameters = network().named_parameters();
    for (const auto& item : parameters) {
      tensors.insert("network." + item.key(), item.value());
    }
    const auto& momentum = optimizer().momentum_buffers();
    for (size_t i = 0; i < momentum.size(); ++i) {
      tensors.insert("momentum." + parameters[i].key(), momentum[i]);
    }
    for (const auto& item : network().named_buffers()) {
      tensors.insert("network." + item.key(), item.value());
    }
    return tensors;
  }

  revnet::RevNetImpl& network() const {
    return learner_.network();
  }

  revnet::FusedSgd& optimizer() {
    return learner_.optimizer();
  }

  torch::Device device() const {
    return learner_.device();
  }

  Team& team() const {
    return learner_.team();
  }

 private:
  std::unique_ptr<Steps> make_steps(
      const Config& config,
      const Images& images,
      memcnn::AllocationMeter& meter,
      StepsOn steps_on) {
    const auto format = memory_format_of(config);
    const Slice slice{learner_.team().rank(), learner_.team().size()};
    if (steps_on == StepsOn::kHost) {
      return std::make_unique<HostSteps>(
          learner_,
          TrainingBatches(
              images, normalise_, config.batch_size, config.seed, slice),
          format,
          meter);
    }
    return std::make_unique<DeviceSteps>(
        learner_,
        DeviceBatches(
            DeviceImages(images, normalise_, device(), format),
            TrainingCrops(images.size(), config.batch_size, config.seed, slice),
            device()),
        meter,
        uses_graph(config, device()));
  }

  int64_t num_classes_;
  int64_t test_batch_;
  Normalisation normalise_;
  DeviceImages test_;
  Learner learner_;
  std::unique_ptr<Steps> steps_;
};

} // namespace training
