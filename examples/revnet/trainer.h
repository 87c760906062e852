// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "autocast.h"
#include "batches.h"
#include "config.h"
#include "images.h"
#include "memory_use.h"
#include "network.h"

#include <torch/cuda.h>
#include <torch/nn.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace training {

/// What one training step has to tell.
struct StepResult {
  double loss = 0; // mean over the batch
  int64_t correct = 0; // images of the batch that were classified right
  double milliseconds = 0;
  MemoryUse memory;
};

/// What the test images have to tell.
struct Evaluation {
  double loss = 0;
  double accuracy = 0; // 0 to 1
};

/// A network, its optimizer and its data: all that a step touches.
class Trainer {
 public:
  /// The meter must count the memory of `device` and outlive the trainer.
  Trainer(
      const Config& config,
      const DataSet& data,
      torch::Device device,
      memcnn::AllocationMeter& meter)
      : config_(config),
        device_(device),
        meter_(meter),
        network_(make_network(config, data.num_classes)),
        optimizer_(make_optimizer()),
        test_(data.test),
        normalise_(data.train.pixels),
        batches_(data.train, normalise_, config.batch_size, config.seed) {}

  /// Learns from one batch. A loss that is not finite comes back as it is, and
  /// the weights stay as they were.
  StepResult step(int64_t iteration) {
    const auto start = std::chrono::steady_clock::now();
    network().train();
    for (auto& group : optimizer_.param_groups()) {
      group.options().set_lr(learning_rate_at(config_, iteration));
    }
    const Batch batch = batches_.at(iteration);
    optimizer_.zero_grad();

    StepResult result;
    const int64_t before = meter_.held_bytes();
    meter_.reset_peak();
    torch::Tensor loss;
    {
      const AutocastGuard autocast(device_.type(), config_.autocast);
      const torch::Tensor logits = network_.forward(batch.images);
      loss = torch::nn::functional::cross_entropy(
          logits.to(torch::kFloat32), batch.labels);
      result.correct = (logits.argmax(1) == batch.labels).sum().item<int64_t>();
    }
    result.loss = loss.item<double>();
    result.memory.held_after_forward = meter_.held_bytes() - before;
    if (!std::isfinite(result.loss)) {
      return result;
    }
    loss.backward();
    optimizer_.step();
    if (device_.is_cuda()) {
      torch::cuda::synchronize();
    }
    result.memory.peak = meter_.peak_bytes() - before;
    const std::chrono::duration<double, std::milli> time =
        std::chrono::steady_clock::now() - start;
    result.milliseconds = time.count();
    return result;
  }

  /// Classifies the test images, as they are. `go_on` is told the share done,
  /// and stops the evaluation by returning false.
  Evaluation evaluate(const std::function<bool(double)>& go_on) {
    constexpr int64_t kCount = 200; // images at once
    const torch::NoGradGuard no_grad;
    network().eval();
    double loss = 0;
    int64_t correct = 0;
    for (int64_t first = 0; first < test_.size(); first += kCount) {
      if (!go_on(
              static_cast<double>(first) / static_cast<double>(test_.size()))) {
        break;
      }
      const Batch batch = test_batch(test_, normalise_, first, kCount);
      const AutocastGuard autocast(device_.type(), config_.autocast);
      const torch::Tensor logits =
          network_.forward(batch.images).to(torch::kFloat32);
      loss += torch::nn::functional::cross_entropy(
                  logits,
                  batch.labels,
                  torch::nn::functional::CrossEntropyFuncOptions().reduction(
                      torch::kSum))
                  .item<double>();
      correct += (logits.argmax(1) == batch.labels).sum().item<int64_t>();
    }
    const auto count = static_cast<double>(test_.size());
    return {loss / count, static_cast<double>(correct) / count};
  }

  bool weights_are_finite() {
    return std::all_of(
        parameters_.begin(), parameters_.end(), [](const torch::Tensor& p) {
          return torch::isfinite(p).all().item<bool>();
        });
  }

  int64_t parameter_count() const {
    int64_t count = 0;
    for (const auto& parameter : parameters_) {
      count += parameter.numel();
    }
    return count;
  }

  int64_t parameter_bytes() const {
    int64_t bytes = 0;
    for (const auto& parameter : parameters_) {
      bytes += static_cast<int64_t>(parameter.nbytes());
    }
    return bytes;
  }

  torch::nn::Module& network() {
    return *network_.ptr();
  }

  torch::optim::SGD& optimizer() {
    return optimizer_;
  }

  torch::Device device() const {
    return device_;
  }

 private:
  torch::optim::SGD make_optimizer() {
    network().to(device_);
    parameters_ = network().parameters();
    return torch::optim::SGD(
        parameters_,
        torch::optim::SGDOptions(config_.learning_rate)
            .momentum(config_.momentum)
            .weight_decay(config_.weight_decay));
  }

  Config config_;
  torch::Device device_;
  memcnn::AllocationMeter& meter_;
  torch::nn::AnyModule network_;
  std::vector<torch::Tensor> parameters_;
  torch::optim::SGD optimizer_;
  Images test_;
  Normalisation normalise_;
  TrainingBatches batches_;
};

} // namespace training
