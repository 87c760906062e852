// SPDX-License-Identifier: MIT

// memcnn_flows: memory and time of a training step of a normalizing flow.

#include "benchmark/config.h"
#include "benchmark/flows_command_line.h"
#include "benchmark/flows_config.h"
#include "benchmark/flows_contest.h"
#include "benchmark/flows_table.h"
#include "support/allocator.h"
#include "support/command_line.h"
#include "support/error.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <CLI/CLI.hpp>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <vector>

namespace benchmark {

namespace {

void check_together(const FlowConfig& config) {
  const int64_t multiple = int64_t{1} << config.levels;
  if (config.size % multiple != 0) {
    throw support::Error(fmt::format(
        "expected --size of a multiple of {} for --levels {}, each of which "
        "halves height and width, but got {}.",
        multiple,
        config.levels,
        config.size));
  }
  if (config.device == "cuda" && !torch::cuda::is_available()) {
    throw support::Error(
        "expected a GPU that LibTorch can use for --device cuda, but found "
        "none. Give --device cpu.");
  }
}

std::optional<FlowConfig> parse(int argc, const char** argv) {
  constexpr int64_t kMostLevels = 8;
  FlowConfig config;
  CLI::App app(
      "Memory and time of one training step of a Glow (squeeze, then steps of "
      "ActNorm, Conv1x1 and\none-sided affine coupling, in several levels), with "
      "its log-determinant in the loss: with\nordinary autograd, and saving "
      "memory.",
      "memcnn_flows");
  support::add_common_options(app);
  detail::add_flow(
      app, config, "Steps a level; comma-separated, a flow of its own each");
  app.add_option(
         "--levels",
         config.levels,
         "Of which each but the last one "
         "makes a latent of half of its channels")
      ->transform(support::whole_number(1, kMostLevels));
  app.add_option("--matrix", config.matrix, "Of the 1x1 convolutions")
      ->check(support::one_of(matrix_names()));
  app.add_option(
         "--memory-format",
         config.memory_format,
         "Of the stream between blocks, whatever the image has; channels-last: "
         "faster convolutions on a CPU")
      ->check(support::one_of(memory_format_names()));
  app.option_defaults()->group("The measurement");
  app.add_option("--engines", config.engines, "Comma-separated")
      ->delimiter(',')
      ->check(support::one_of(flow_engine_names()));
  detail::add_flow_run(app, config);
  app.add_option("--device", config.device)
      ->check(support::one_of(device_names()));
  app.add_option(
         "--steps",
         config.steps,
         "Timed rounds, one step of each engine a round; 0 for memory alone")
      ->transform(support::count_from(0));
  app.add_option("--warmup", config.warmup, "Rounds before the timed ones")
      ->transform(support::count_from(0));
  app.add_flag(
      "--log-det",
      config.log_det,
      "Run forward twice more, and say what is held more with the "
      "log-determinant");
  app.add_flag(
      "--default-allocator",
      config.default_allocator,
      "Let the C library give freed memory back to the system, as it does by "
      "itself");
  if (!support::parse(app, argc, argv)) {
    return std::nullopt;
  }
  check_together(config);
  return config;
}

void measure(const FlowConfig& config) {
  if (!config.default_allocator) {
    support::keep_freed_memory();
  }
  at::set_num_threads(static_cast<int>(config.threads));
  std::vector<FlowMeasurement> all;
  for (const int64_t depth : config.depths) {
    const auto results = FlowContest(config, depth).run();
    if (config.json) {
      print_flow_json(config, results);
    }
    all.insert(all.end(), results.begin(), results.end());
  }
  if (!config.json) {
    print_flows(config, all);
  }
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
    fmt::print(stderr, "memcnn_flows: {}\n", support::message_of(error));
    return 1;
  }
}
