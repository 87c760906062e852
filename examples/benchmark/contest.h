// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/budget.h"
#include "benchmark/config.h"
#include "benchmark/engines.h"
#include "benchmark/measurement.h"
#include "benchmark/network.h"
#include "benchmark/step.h"
#include "support/error.h"
#include "support/median.h"

#include <ATen/core/Tensor.h>
#include <torch/nn.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace benchmark {

inline at::ScalarType dtype_of(const std::string& name) {
  return name == "float64" ? at::kDouble
      : name == "bfloat16" ? at::kBFloat16
      : name == "float16"  ? at::kHalf
                           : at::kFloat;
}

inline at::MemoryFormat memory_format_of(const std::string& name) {
  return name == "channels-last" ? at::MemoryFormat::ChannelsLast
                                 : at::MemoryFormat::Contiguous;
}

/// The first module of a type, in the order of registration.
template <class Impl>
Impl& first_of(const torch::nn::Module& module) {
  for (const auto& child : module.modules()) {
    if (auto* found = child->as<Impl>()) {
      return *found;
    }
  }
  throw std::logic_error("memcnn_benchmark: no such module");
}

/// Measures engines on one network and one image. All of them share its
/// modules; gradients and buffers are as new at the start of each check.
///
/// Times are taken in rounds, one step of each engine a round: what else the
/// machine does meanwhile hits all of them alike, and the ratio to the plain
/// engine's time in the same round hardly moves.
template <class Coupling>
class Contest {
 public:
  explicit Contest(const Config& config) : config_(config) {
    // Drawn on the CPU in float32, for the same values everywhere.
    torch::manual_seed(static_cast<uint64_t>(config.seed));
    network_ = std::make_shared<Network<Coupling>>(config);
    image_ = torch::randn({config.batch, 3, config.size, config.size});
    const at::Device device(config.device);
    network_->to(device, dtype_of(config.dtype));
    const auto format = memory_format_of(config.memory_format);
    image_ = image_.to(device, dtype_of(config.dtype)).contiguous(format);
    parameters_ = network_->parameters();
    for (const at::Tensor& parameter : parameters_) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.data().contiguous(format));
      }
    }
    for (const at::Tensor& buffer : network_->buffers()) {
      buffers_.emplace_back(buffer, buffer.clone());
    }
  }

  /// The plain engine comes first, listed or not: the others are compared with
  /// it. One that fails says why, and the others go on.
  std::vector<Measurement> run() {
    contenders_.push_back({});
    contenders_.back().result.engine = "plain";
    for (const std::string& name : config_.engines) {
      if (name != "plain") {
        contenders_.push_back({});
        contenders_.back().result.engine = name;
      }
    }
    for (Contender& contender : contenders_) {
      attempt(contender, [&] { look_at(contender); });
    }
    for (int64_t round = -config_.warmup; round < config_.steps; ++round) {
      for (size_t i = 0; i < contenders_.size(); ++i) {
        // Each engine has its turn to go first.
        Contender& contender = contenders_
            [(i + static_cast<size_t>(round + config_.warmup)) %
             contenders_.size()];
        attempt(contender, [&] {
          forget_gradients();
          const StepTime time = time_step(contender.engine, image_);
          if (round >= 0) {
            contender.result.times.push_back(time);
          }
        });
      }
    }
    compare_times();

    std::vector<Measurement> results;
    for (Contender& contender : contenders_) {
      results.push_back(std::move(contender.result));
    }
    return results;
  }

 private:
  struct Contender {
    Engine engine;
    Measurement result;
  };

  Measurement& plain() {
    return contenders_.front().result;
  }

  template <class Fn>
  static void attempt(Contender& contender, const Fn& fn) {
    if (contender.result.failed()) {
      return;
    }
    try {
      fn();
    } catch (const std::exception& error) {
      contender.result.error = support::message_of(error);
    }
  }

  void look_at(Contender& contender) {
    Measurement& result = contender.result;
    int64_t budget_bytes = 0;
    if (result.engine == "sequence-budget") {
      budget_bytes = Budget(config_.budget).bytes(held_by_plain());
      result.budget_bytes = budget_bytes;
    }
    contender.engine =
        make_engine(result.engine, config_, network_, budget_bytes);
    if (result.engine == "plain") {
      restore();
      first_step(contender.engine);
      plain_gradients_ = gradients();
    }
    restore();
    first_step(contender.engine);
    auto& first_norm = first_of<torch::nn::BatchNorm2dImpl>(first_block());
    auto& first_conv = first_of<torch::nn::Conv2dImpl>(first_block());
    for (const at::Tensor& parameter : parameters_) {
      result.parameters += parameter.numel();
    }
    result.bn_updates = first_norm.num_batches_tracked.template item<int64_t>();
    result.grad_norm_first =
        first_conv.weight.grad().norm().template item<double>();
    result.grad_rel_error = gradient_error();

    forget_gradients();
    result.memory = meter_step(contender.engine, image_);
    if (result.engine == "sequence-budget") {
      result.kept_blocks = contender.engine.kept_blocks();
    }
  }

  torch::nn::Module& first_block() {
    return *network_->blocks.front();
  }

  std::optional<int64_t> held_by_plain() {
    return plain().failed() ? std::nullopt
                            : std::optional<int64_t>(plain().memory.saved);
  }

  void first_step(const Engine& engine) {
    loss_of(engine.forward(image_)).backward();
  }

  void forget_gradients() {
    for (at::Tensor& parameter : parameters_) {
      parameter.mutable_grad() = at::Tensor();
    }
  }

  /// As after construction.
  void restore() {
    forget_gradients();
    const at::NoGradGuard no_grad;
    for (const auto& [buffer, value] : buffers_) {
      buffer.copy_(value);
    }
  }

  std::vector<at::Tensor> gradients() const {
    std::vector<at::Tensor> copies;
    for (const at::Tensor& parameter : parameters_) {
      copies.push_back(
          parameter.grad().defined() ? parameter.grad().clone()
                                     : at::zeros_like(parameter));
    }
    return copies;
  }

  /// Norm of the difference to the plain engine's, by the norm of the latter.
  std::optional<double> gradient_error() const {
    if (plain_gradients_.empty()) {
      return std::nullopt;
    }
    const std::vector<at::Tensor> found = gradients();
    double difference = 0;
    double all = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      const at::Tensor expected = plain_gradients_[i].to(at::kDouble);
      difference += (found[i].to(at::kDouble) - expected)
                        .square()
                        .sum()
                        .template item<double>();
      all += expected.square().sum().template item<double>();
    }
    return std::sqrt(difference / all);
  }

  void compare_times() {
    if (plain().failed()) {
      return;
    }
    const double forward = median_of(plain().times, &StepTime::forward);
    const double backward = median_of(plain().times, &StepTime::backward);
    for (Contender& contender : contenders_) {
      Measurement& result = contender.result;
      if (result.failed()) {
        continue;
      }
      std::vector<double> ratios;
      for (size_t i = 0; i < result.times.size(); ++i) {
        ratios.push_back(result.times[i].step() / plain().times[i].step());
      }
      result.ratio_to_plain = support::median(std::move(ratios));
      result.fused_limit = (2 * forward + backward) / (forward + backward);
    }
  }

  Config config_;
  std::shared_ptr<Network<Coupling>> network_;
  at::Tensor image_;
  std::vector<at::Tensor> parameters_;
  std::vector<std::pair<at::Tensor, at::Tensor>> buffers_; // and their values
  std::vector<at::Tensor> plain_gradients_;
  std::vector<Contender> contenders_;
};

} // namespace benchmark
