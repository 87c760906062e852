// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/flows_config.h"
#include "benchmark/flows_network.h"
#include "benchmark/gradients.h"
#include "benchmark/step_measures.h"

#include <memcnn/allocation_meter.h>
#include <memcnn/flow/initialize.h>
#include <memcnn/flow/multi_scale.h>
#include <memcnn/plain_autograd.h>

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace benchmark {

inline int64_t bytes_of(const std::vector<at::Tensor>& tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    bytes += static_cast<int64_t>(tensor.nbytes());
  }
  return bytes;
}

/// A way to run a flow.
struct FlowEngine {
  bool is_plain = false; // ordinary autograd, over the same blocks
  int64_t anchor_every = 0;

  std::string name() const {
    return is_plain        ? "plain"
        : anchor_every > 0 ? fmt::format("saving, anchors {}", anchor_every)
                           : "saving";
  }
};

/// What is known of one engine and one depth in the end.
struct FlowMeasurement {
  FlowEngine engine;
  int64_t depth = 0;
  int64_t parameter_bytes = 0;
  int64_t image_bytes = 0;
  /// What is held more after forward with the log-determinant than without;
  /// of what saves memory.
  std::optional<int64_t> log_det_bytes;
  StepMemory memory;
  std::optional<double> grad_rel_error; // to plain's gradients

  std::vector<StepTime> times; // one a round
  std::optional<double> ratio_to_plain; // median over the rounds
  std::optional<double> fused_limit; // the same for every engine
};

/// Measures engines on one flow and one batch; all share its modules. As in
/// Contest, times are taken in rounds, engines in turn.
class FlowContest {
 public:
  FlowContest(const FlowConfig& config, int64_t depth) : config_(config) {
    torch::manual_seed(static_cast<uint64_t>(config.seed));
    flow_ = make_glow(config, depth);
    image_ = torch::rand({config.batch, 3, config.size, config.size}) - 0.5;
    memcnn::initialize(flow_, image_);
    const at::Device device(config.device);
    flow_->to(device);
    image_ = image_.to(device);
    parameters_ = flow_->parameters();
    for (const std::string& name : config.engines) {
      if (name == "plain") {
        enter({/*is_plain=*/true}, depth);
      } else {
        for (const int64_t anchor_every : config.anchors) {
          enter({/*is_plain=*/false, anchor_every}, depth);
        }
      }
    }
  }

  std::vector<FlowMeasurement> run() {
    for (FlowMeasurement& result : results_) {
      meter(result);
    }
    for (int64_t round = -config_.warmup; round < config_.steps; ++round) {
      run_round(round);
    }
    compare();
    return results_;
  }

 private:
  void enter(const FlowEngine& engine, int64_t depth) {
    FlowMeasurement& result = results_.emplace_back();
    result.engine = engine;
    result.depth = depth;
    result.parameter_bytes = bytes_of(parameters_);
    result.image_bytes = bytes_of({image_});
  }

  void use(const FlowEngine& engine) {
    for (size_t i = 0; i < flow_->size(); ++i) {
      flow_->level(i)->options.anchor_every(engine.anchor_every);
    }
  }

  /// Forward and loss.
  at::Tensor forward(const FlowEngine& engine) {
    const memcnn::PlainAutogradGuard plain(engine.is_plain);
    const memcnn::Latents latents = flow_->forward_with_log_det(image_);
    return flow_loss(latents.z, latents.log_det);
  }

  void meter(FlowMeasurement& result) {
    use(result.engine);
    forget_gradients(parameters_);
    result.memory =
        meter_step([&] { return forward(result.engine); }, image_.device());
    if (result.engine.is_plain) {
      plain_gradients_ = gradients_of(parameters_);
    } else if (!plain_gradients_.empty()) {
      result.grad_rel_error =
          relative_error(gradients_of(parameters_), plain_gradients_);
    }
    if (config_.log_det && !result.engine.is_plain) {
      result.log_det_bytes =
          held_by([&] { return flow_->forward_with_log_det(image_); }) -
          held_by([&] { return flow_->forward(image_); });
    }
  }

  template <class Forward>
  int64_t held_by(const Forward& forward) const {
    const memcnn::AllocationMeter meter(image_.device().type());
    const auto results = forward();
    return meter.held_bytes();
  }

  /// One step of each engine; rounds below 0 are not counted.
  void run_round(int64_t round) {
    const auto first = static_cast<size_t>(round + config_.warmup);
    for (size_t i = 0; i < results_.size(); ++i) {
      // Each engine has its turn to go first.
      FlowMeasurement& result = results_[(first + i) % results_.size()];
      use(result.engine);
      forget_gradients(parameters_);
      const StepTime time =
          time_step([&] { return forward(result.engine); }, image_.device());
      if (round >= 0) {
        result.times.push_back(time);
      }
    }
  }

  void compare() {
    for (const FlowMeasurement& plain : results_) {
      if (!plain.engine.is_plain || plain.times.empty()) {
        continue;
      }
      for (FlowMeasurement& result : results_) {
        result.ratio_to_plain = ratio_of(result.times, plain.times);
        result.fused_limit = fused_limit_of(plain.times);
      }
    }
  }

  FlowConfig config_;
  memcnn::MultiScale flow_;
  at::Tensor image_;
  std::vector<at::Tensor> parameters_;
  std::vector<at::Tensor> plain_gradients_;
  std::vector<FlowMeasurement> results_;
};

} // namespace benchmark
