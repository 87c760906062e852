// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/budget.h"
#include "benchmark/config.h"
#include "support/command_line.h"
#include "support/error.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace benchmark {

namespace detail {

using support::count_from;
using support::whole_number;

inline void add_sizes(CLI::App& app, Config& config) {
  constexpr int64_t kMostCouplings = 10000;
  constexpr int64_t kMostInADim = 8192; // in two of an image: 768 MiB
  app.option_defaults()->group("The network");
  app.add_option("--depth", config.depth, "Couplings")
      ->transform(whole_number(1, kMostCouplings));
  app.add_option("--channels", config.channels, "Channels of one half")
      ->transform(whole_number(1, kMostInADim));
  app.add_option("--batch", config.batch, "Images in a step")
      ->transform(whole_number(1, kMostInADim));
  app.add_option("--size", config.size, "Height and width of an image")
      ->transform(whole_number(1, kMostInADim));
}

inline void add_network(CLI::App& app, Config& config) {
  add_sizes(app, config);
  app.add_option(
         "--coupling",
         config.coupling,
         "exact: additive with 16 fractional bits, which is rebuilt without an "
         "error")
      ->check(support::one_of(coupling_names()));
  app.add_option("--dtype", config.dtype, "Of weights and image")
      ->check(support::one_of(dtype_names()));
  app.add_option(
         "--precision",
         config.precision,
         "In which float32 tensors are convolved; tf32: rounded by a GPU; "
         "bfloat16: cast by autocast")
      ->check(support::one_of(precision_names()));
  app.add_option(
         "--memory-format",
         config.memory_format,
         "Of weights and image; channels-last: faster convolutions on a CPU")
      ->check(support::one_of(memory_format_names()));
  app.add_option("--seed", config.seed, "Of weights and image")
      ->transform(support::seed());
}

inline void add_engines(CLI::App& app, Config& config) {
  app.option_defaults()->group("The engines");
  app.add_option("--engines", config.engines, "Comma-separated")
      ->delimiter(',')
      ->check(support::one_of(engine_names()));
  app.add_option(
         "--sequence-format",
         config.sequence_format,
         "Memory format in which halves travel in a sequence, whatever the "
         "image has")
      ->check(support::one_of(sequence_format_names()));
  app.add_option(
         "--budget",
         config.budgets,
         "What a budget may keep: a number of MiB (0 to 1000000000), a "
         "percentage of what plain holds (0% to 1000%), or all; "
         "comma-separated, of which each is an engine of its own")
      ->delimiter(',');
}

inline void add_measurement(CLI::App& app, Config& config) {
  app.option_defaults()->group("The measurement");
  app.add_option("--device", config.device)
      ->check(support::one_of(device_names()));
  app.add_flag(
      "--graph",
      config.graph,
      "Replay the step of each engine as one CUDA graph");
  app.add_option("--threads", config.threads, "Threads on the CPU")
      ->transform(support::threads_from(1));
  app.add_option(
         "--steps",
         config.steps,
         "Timed rounds, one step of each engine a round")
      ->transform(count_from(1));
  app.add_option("--warmup", config.warmup, "Rounds before the timed ones")
      ->transform(count_from(0));
  app.add_flag(
      "--default-allocator",
      config.default_allocator,
      "Let the C library give freed memory back to the system, as it does by "
      "itself");
  app.add_flag(
      "--json", config.json, "One JSON object an engine and line, no table");
}

/// What each option allows, but not all of them together.
inline void check_together(const Config& config) {
  if (config.device != "cuda" && (config.graph || config.precision == "tf32")) {
    throw support::Error(fmt::format(
        "expected --device cuda for {}, but got --device {}. Leave one of them "
        "out.",
        config.graph ? "--graph" : "--precision tf32",
        config.device));
  }
  if (config.dtype != "float32" && config.precision != "ieee") {
    throw support::Error(fmt::format(
        "expected --dtype float32 for --precision {}, but got --dtype {}. Leave "
        "one of them out.",
        config.precision,
        config.dtype));
  }
}

} // namespace detail

/// Reads the command line. Nothing is returned where --help or --version was
/// all that was asked for.
///
/// Throws:   Error if an argument is unknown or out of range.
inline std::optional<Config> parse_command_line(int argc, const char** argv) {
  Config config;
  CLI::App app(
      "Measures one training step of one network under several engines: time, "
      "memory of tensors,\nand how far the gradients are from those of "
      "ordinary autograd. All engines have the same\nweights and image. The "
      "network is a convolution and couplings over the two halves of its\n"
      "channels, with F and G = batch normalisation, ReLU, convolution, twice. "
      "A step is forward,\nloss and backward, without an optimiser.",
      "memcnn_benchmark");
  support::add_common_options(app);
  detail::add_network(app, config);
  detail::add_engines(app, config);
  detail::add_measurement(app, config);
  if (!support::parse(app, argc, argv)) {
    return std::nullopt;
  }
  detail::check_together(config);
  for (const std::string& budget : config.budgets) {
    static_cast<void>(Budget(budget)); // an error before the first step
  }
  return config;
}

} // namespace benchmark
