// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/budget.h"
#include "benchmark/config.h"
#include "benchmark/engines.h"
#include "benchmark/gradients.h"
#include "benchmark/measurement.h"
#include "benchmark/network.h"
#include "benchmark/step.h"
#include "benchmark/step_measures.h"
#include "revnet/captured_step.h"
#include "support/error.h"

#include <ATen/core/Tensor.h>
#include <torch/nn.h>
#include <torch/types.h>
#include <torch/utils.h>

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
    enter("plain");
    for (const std::string& name : config_.engines) {
      if (has_budget(name)) {
        for (const std::string& budget : config_.budgets) {
          enter(name, budget);
        }
      } else if (name != "plain") {
        enter(name);
      }
    }
    for (Contender& contender : contenders_) {
      attempt(contender, [&] { look_at(contender); });
    }
    for (int64_t round = -config_.warmup; round < config_.steps; ++round) {
      run_round(round);
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
    std::unique_ptr<revnet::CapturedStep> graph; // if there are to be graphs
    Measurement result;
  };

  void enter(const std::string& engine, const std::string& budget = "") {
    contenders_.push_back({});
    contenders_.back().result.engine = engine;
    contenders_.back().result.budget = budget;
  }

  /// One step of each engine; rounds below 0 are not counted.
  void run_round(int64_t round) {
    const auto first = static_cast<size_t>(round + config_.warmup);
    for (size_t i = 0; i < contenders_.size(); ++i) {
      // Each engine has its turn to go first.
      Contender& contender = contenders_[(first + i) % contenders_.size()];
      attempt(contender, [&] {
        const StepTime time = run_step(contender);
        if (round >= 0) {
          contender.result.times.push_back(time);
        }
      });
    }
  }

  StepTime run_step(Contender& contender) {
    if (contender.graph) {
      return time_replay(*contender.graph, image_.device());
    }
    forget_gradients(parameters_);
    return time_step(contender.engine, image_);
  }

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
    build(contender);
    compare_gradients(contender);
    meter(contender);
    if (config_.graph) {
      capture(contender);
    }
  }

  void build(Contender& contender) {
    Measurement& result = contender.result;
    if (!result.budget.empty()) {
      result.budget_bytes = Budget(result.budget).bytes(held_by_plain());
    }
    contender.engine = make_engine(
        result.engine, config_, network_, result.budget_bytes.value_or(0));
    contender.engine.autocast = config_.precision == "bfloat16";
  }

  /// Of the first step, from the same state for every engine.
  void compare_gradients(Contender& contender) {
    Measurement& result = contender.result;
    if (result.engine == "plain") {
      restore();
      first_step(contender.engine);
      plain_gradients_ = gradients_of(parameters_);
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
  }

  void meter(Contender& contender) {
    forget_gradients(parameters_);
    contender.result.memory = meter_step(contender.engine, image_);
    if (contender.engine.kept) {
      contender.result.kept = contender.engine.kept();
    }
  }

  /// Makes a graph of the engine's step. From here on the gradients of a replay
  /// count, not those of an eager step.
  void capture(Contender& contender) {
    const auto step = [this, engine = contender.engine](const auto&) {
      forget_gradients(parameters_);
      const at::Tensor loss = benchmark::run(engine, image_);
      loss.backward();
      return std::vector<at::Tensor>{loss};
    };
    contender.graph =
        std::make_unique<revnet::CapturedStep>(image_.device(), step);
    while (!contender.graph->is_captured()) {
      (*contender.graph)();
    }
    contender.result.graph_bytes = contender.graph->graph_bytes();
    contender.result.grad_rel_error = gradient_error();
  }

  torch::nn::Module& first_block() {
    return *network_->blocks.front();
  }

  std::optional<int64_t> held_by_plain() {
    return plain().failed() ? std::nullopt
                            : std::optional<int64_t>(plain().memory.saved);
  }

  void first_step(const Engine& engine) {
    benchmark::run(engine, image_).backward();
  }

  /// As after construction.
  void restore() {
    forget_gradients(parameters_);
    const at::NoGradGuard no_grad;
    for (const auto& [buffer, value] : buffers_) {
      buffer.copy_(value);
    }
  }

  std::optional<double> gradient_error() const {
    return plain_gradients_.empty()
        ? std::nullopt
        : std::optional<double>(
              relative_error(gradients_of(parameters_), plain_gradients_));
  }

  void compare_times() {
    if (plain().failed()) {
      return;
    }
    for (Contender& contender : contenders_) {
      Measurement& result = contender.result;
      if (result.failed()) {
        continue;
      }
      result.ratio_to_plain = ratio_of(result.times, plain().times);
      if (!config_.graph) {
        result.fused_limit = fused_limit_of(plain().times);
      }
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
