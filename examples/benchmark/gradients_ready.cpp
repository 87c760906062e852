// SPDX-License-Identifier: MIT
//
// When gradients are ready in backward, and what a step takes at its peak that
// uses each as soon as it is.

#include "benchmark/command_line.h"
#include "benchmark/config.h"
#include "benchmark/engines.h"
#include "benchmark/network.h"
#include "benchmark/readiness.h"
#include "benchmark/rows.h"
#include "benchmark/step.h"
#include "revnet/step_in_backward.h"
#include "support/command_line.h"
#include "support/error.h"

#include <memcnn/allocation_meter.h>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/optim.h>
#include <torch/types.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace benchmark {

namespace {

constexpr int64_t kNoBudget = 0;
constexpr double kLearningRate = 1e-3; // the same memory as any other

/// Bytes at the peak of a step of an engine, beyond what is held before it:
/// parameters, and gradients or state of an optimiser where these exist.
class Peaks {
 public:
  Peaks(std::shared_ptr<Network<Additive>> network, Engine engine, at::Tensor x)
      : network_(std::move(network)),
        engine_(std::move(engine)),
        image_(std::move(x)) {}

  /// Gradients are new, or are added to those of an earlier step.
  int64_t of_backward(bool accumulate) {
    network_->zero_grad();
    if (accumulate) {
      run(engine_, image_).backward();
    }
    return metered([&] { run(engine_, image_).backward(); });
  }

  int64_t of_step(torch::optim::Optimizer& optimizer, bool within_backward) {
    std::optional<revnet::StepInBackward> stepping;
    if (within_backward) {
      stepping.emplace(optimizer);
    }
    const auto step = [&] {
      run(engine_, image_).backward();
      optimizer.step(); // nothing to do where backward has done it
    };
    network_->zero_grad();
    step(); // makes the state
    network_->zero_grad();
    return metered(step);
  }

 private:
  template <class Step>
  int64_t metered(Step step) {
    const memcnn::AllocationMeter meter(image_.device().type());
    step();
    return meter.peak_bytes();
  }

  std::shared_ptr<Network<Additive>> network_;
  Engine engine_;
  at::Tensor image_;
};

const std::vector<double> kShares = {0.25, 0.5, 0.75, 0.9, 1};

detail::Row title() {
  detail::Row row = {"engine"};
  for (const double share : kShares) {
    row.push_back(fmt::format("{:.0f} %", 100 * share));
  }
  for (const char* column :
       {"new", "added", "SGD", "in backward", "Adam", "in backward"}) {
    row.emplace_back(column);
  }
  return row;
}

detail::Row row_of(
    const std::string& name,
    const Readiness& readiness,
    Peaks peaks,
    const std::vector<at::Tensor>& parameters) {
  detail::Row row = {name};
  for (const double share : kShares) {
    row.push_back(detail::fixed(100 * readiness.branches_at(share), 0));
  }
  const auto push = [&](int64_t bytes) {
    row.push_back(detail::fixed(detail::mebibytes(bytes), 2));
  };
  push(peaks.of_backward(/*accumulate=*/false));
  push(peaks.of_backward(/*accumulate=*/true));
  const auto push_steps = [&](torch::optim::Optimizer& optimizer) {
    push(peaks.of_step(optimizer, /*within_backward=*/false));
    push(peaks.of_step(optimizer, /*within_backward=*/true));
  };
  torch::optim::SGD sgd(
      parameters, torch::optim::SGDOptions(kLearningRate).momentum(0.9));
  push_steps(sgd);
  torch::optim::Adam adam(parameters, kLearningRate);
  push_steps(adam);
  return row;
}

void measure(const Config& config) {
  torch::manual_seed(static_cast<uint64_t>(config.seed));
  at::set_num_threads(static_cast<int>(config.threads));
  const auto network = std::make_shared<Network<Additive>>(config);
  ReadinessMeter meter(*network);
  network->to(torch::Device(config.device));
  const at::Tensor image = torch::randn(
      {config.batch, 3, config.size, config.size},
      torch::TensorOptions(torch::Device(config.device)));
  std::vector<detail::Row> rows = {title()};
  for (const std::string& name : config.engines) {
    const Engine engine = make_engine(name, config, network, kNoBudget);
    rows.push_back(row_of(
        name,
        meter.measure(engine, image),
        Peaks(network, engine, image),
        network->parameters()));
  }
  int64_t bytes = 0;
  for (const at::Tensor& parameter : network->parameters()) {
    bytes += static_cast<int64_t>(parameter.nbytes());
  }
  fmt::print(
      "{} couplings of 2 x {} channels, batch {}, {} x {}, {}: {:.2f} MiB of "
      "parameters\n\n",
      config.depth,
      config.channels,
      config.batch,
      config.size,
      config.size,
      config.device,
      detail::mebibytes(bytes));
  detail::print_rows(rows);
  fmt::print(
      "\n"
      "25 % to 100 %    of the branches, those that backward has begun with when "
      "that share\n"
      "                 of the bytes of gradients is there\n"
      "new, added       peak of forward and backward in MiB, where gradients are "
      "made, and\n"
      "                 where they are added to those that exist\n"
      "SGD, Adam        peak of a step with its update, after backward and in "
      "it\n");
}

/// A budget is not asked for here.
std::vector<std::string> engines_without_budget() {
  std::vector<std::string> names = engine_names();
  names.erase(
      std::remove_if(names.begin(), names.end(), has_budget), names.end());
  return names;
}

std::optional<Config> parse(int argc, const char** argv) {
  Config config;
  config.depth = 32;
  config.channels = 32;
  config.batch = 8;
  config.size = 16;
  config.threads = 1;
  config.engines = {"plain", "checkpoint", "wrapper", "sequence"};
  CLI::App app(
      "When gradients are ready in backward of one network under several "
      "engines, and what a\nstep takes at its peak that uses them at once.",
      "memcnn_gradients_ready");
  support::add_common_options(app);
  detail::add_sizes(app, config);
  app.option_defaults()->group("The measurement");
  app.add_option("--engines", config.engines, "Comma-separated")
      ->delimiter(',')
      ->check(support::one_of(engines_without_budget()));
  app.add_option("--device", config.device)
      ->check(support::one_of(device_names()));
  app.add_option("--threads", config.threads, "Threads on the CPU")
      ->transform(support::threads_from(1));
  return support::parse(app, argc, argv) ? std::optional(config) : std::nullopt;
}

} // namespace

} // namespace benchmark

int main(int argc, const char** argv) {
  try {
    if (const auto config = benchmark::parse(argc, argv)) {
      benchmark::measure(*config);
    }
    return 0;
  } catch (const std::exception& error) {
    fmt::print(
        stderr, "memcnn_gradients_ready: {}\n", support::message_of(error));
    return 1;
  }
}
