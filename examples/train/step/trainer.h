// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "train/base/config.h"
#include "train/data/batches.h"
#include "train/data/images.h"
#include "train/data/prepared_batches.h"
#include "train/libtorch/autocast.h"
#include "train/libtorch/device_read.h"
#include "train/step/loss.h"
#include "train/step/network.h"
#include "train/step/step_result.h"

#include <torch/nn.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

namespace training {

namespace detail {

class Stopwatch {
 public:
  double milliseconds() const {
    const std::chrono::duration<double, std::milli> time =
        std::chrono::steady_clock::now() - start_;
    return time.count();
  }

 private:
  std::chrono::steady_clock::time_point start_ =
      std::chrono::steady_clock::now();
};

/// The network, moved there.
template <class Network>
Network moved_to(torch::Device device, Network network) {
  network.ptr()->to(device);
  return network;
}

inline torch::optim::SGDOptions optimizer_options(const Config& config) {
  return torch::optim::SGDOptions(config.learning_rate)
      .momentum(config.momentum)
      .weight_decay(config.weight_decay);
}

/// Which of the five highest logits is that of the right class, (N, 5), bool;
/// fewer of fewer classes.
inline torch::Tensor ranked_hits(
    const torch::Tensor& logits,
    const torch::Tensor& labels) {
  const int64_t count = std::min<int64_t>(5, logits.size(1));
  return std::get<1>(logits.detach().topk(count, 1)) == labels.unsqueeze(1);
}

/// Loss, hits and hits among the first five, (3), float64: one tensor, so that
/// one copy brings them to the CPU.
inline torch::Tensor figures(
    const torch::Tensor& loss,
    const torch::Tensor& hits) {
  return torch::stack(
      {loss.detach().to(torch::kFloat64),
       hits.select(1, 0).sum().to(torch::kFloat64),
       hits.sum().to(torch::kFloat64)});
}

inline Hits hits_of(const torch::Tensor& figures) {
  const auto* values = figures.const_data_ptr<double>();
  return {static_cast<int64_t>(values[1]), static_cast<int64_t>(values[2])};
}

/// `hits` says of each image whether it was classified right.
inline void add_to_classes(
    std::vector<ClassResult>& classes,
    const torch::Tensor& labels,
    const torch::Tensor& hits) {
  const auto* label = labels.const_data_ptr<int64_t>();
  const auto* hit = hits.const_data_ptr<bool>();
  for (int64_t image = 0; image < labels.numel(); ++image) {
    ClassResult& result = classes[static_cast<size_t>(label[image])];
    ++result.images;
    result.hits += hit[image] ? 1 : 0;
  }
}

} // namespace detail

/// A network, its optimizer and its data: all that a step touches.
class Trainer {
 public:
  /// The meter must count the memory of `device` and outlive the trainer. The
  /// data stay on the CPU; a batch at a time goes to the device.
  Trainer(
      const Config& config,
      const DataSet& data,
      torch::Device device,
      memcnn::AllocationMeter& meter)
      : config_(config),
        device_(device),
        meter_(meter),
        network_(
            detail::moved_to(device, make_network(config, data.num_classes))),
        optimizer_(network().parameters(), detail::optimizer_options(config)),
        num_classes_(data.num_classes),
        test_(data.test),
        normalise_(data.train.pixels),
        batches_(
            TrainingBatches(
                data.train,
                normalise_,
                config.batch_size,
                config.seed),
            /*pinned=*/device.is_cuda()) {}

  /// Learns from one batch. A loss that is not finite comes back as it is, and
  /// the weights stay as they were.
  StepResult step(int64_t iteration) {
    const detail::Stopwatch watch;
    network().train();
    for (auto& group : optimizer_.param_groups()) {
      group.options().set_lr(learning_rate_at(config_, iteration));
    }
    const Batch batch = on_device(batches_.at(iteration));
    optimizer_.zero_grad();

    StepResult result;
    result.data_milliseconds = watch.milliseconds();
    const int64_t before = meter_.held_bytes();
    meter_.reset_peak();
    const auto [loss, hits] = forward(batch);
    const DeviceRead read(detail::figures(loss, hits));
    result.memory.held_after_forward = meter_.held_bytes() - before;
    loss.backward();
    // A GPU has long begun with backward when these arrive.
    const torch::Tensor arrived = read.wait();
    result.loss = arrived[0].item<double>();
    result.hits = detail::hits_of(arrived);
    if (std::isfinite(result.loss)) {
      optimizer_.step();
    }
    result.memory.peak = meter_.peak_bytes() - before;
    result.milliseconds = watch.milliseconds();
    return result;
  }

  /// Classifies the test images, as they are. `go_on` is told the share done;
  /// where it returns false, the evaluation stops, and nothing is returned.
  std::optional<Evaluation> evaluate(const std::function<bool(double)>& go_on) {
    const torch::NoGradGuard no_grad;
    network().eval();
    const auto count = static_cast<double>(test_.size());
    double loss = 0;
    Hits hits;
    std::vector<ClassResult> classes(static_cast<size_t>(num_classes_));
    std::optional<int64_t> not_finite;
    for (int64_t first = 0; first < test_.size(); first += kTestBatch) {
      if (!go_on(static_cast<double>(first) / count)) {
        return std::nullopt;
      }
      const Batch batch = test_batch(first);
      const Forward result = forward(batch);
      const torch::Tensor figures =
          detail::figures(result.loss, result.hits).cpu();
      if (!not_finite && !std::isfinite(figures[0].item<double>())) {
        not_finite = first;
      }
      loss +=
          figures[0].item<double>() * static_cast<double>(batch.labels.size(0));
      hits += detail::hits_of(figures);
      detail::add_to_classes(
          classes,
          batch.labels.cpu(),
          result.hits.select(1, 0).cpu().contiguous());
    }
    return Evaluation{
        loss / count,
        static_cast<double>(hits.first) / count,
        static_cast<double>(hits.top5) / count,
        std::move(classes),
        not_finite};
  }

  /// The test images from that one on, as many as evaluate() takes at once.
  Batch test_batch(int64_t first) const {
    return on_device(
        training::test_batch(test_, normalise_, first, kTestBatch));
  }

  /// The batch of an iteration once more, to look into what it did.
  Batch batch(int64_t iteration) {
    return on_device(batches_.at(iteration));
  }

  bool weights_are_finite() const {
    const auto parameters = network().parameters();
    return std::all_of(
        parameters.begin(), parameters.end(), [](const torch::Tensor& weights) {
          return torch::isfinite(weights).all().item<bool>();
        });
  }

  int64_t parameter_count() const {
    int64_t count = 0;
    for (const auto& parameter : network().parameters()) {
      count += parameter.numel();
    }
    return count;
  }

  int64_t parameter_bytes() const {
    int64_t bytes = 0;
    for (const auto& parameter : network().parameters()) {
      bytes += static_cast<int64_t>(parameter.nbytes());
    }
    return bytes;
  }

  revnet::RevNetImpl& network() const {
    return *network_.ptr();
  }

  torch::optim::SGD& optimizer() {
    return optimizer_;
  }

  torch::Device device() const {
    return device_;
  }

 private:
  static constexpr int64_t kTestBatch = 200;

  struct Forward {
    torch::Tensor loss; // mean over the batch
    torch::Tensor hits; // of ranked_hits()
  };

  Forward forward(const Batch& batch) {
    const AutocastGuard autocast(device_.type(), config_.amp);
    const torch::Tensor logits =
        network_->forward(batch.images).to(torch::kFloat32);
    const torch::Tensor loss = loss_of(logits, batch.labels);
    return {loss, detail::ranked_hits(logits, batch.labels)};
  }

  Batch on_device(const Batch& batch) const {
    const auto move = [&](const torch::Tensor& tensor) {
      return tensor.to(device_, /*non_blocking=*/true);
    };
    return {
        move(batch.images).contiguous(memory_format_of(config_)),
        move(batch.labels)};
  }

  Config config_;
  torch::Device device_;
  memcnn::AllocationMeter& meter_;
  revnet::RevNet network_;
  torch::optim::SGD optimizer_;
  int64_t num_classes_;
  Images test_;
  Normalisation normalise_;
  PreparedBatches batches_;
};

} // namespace training
