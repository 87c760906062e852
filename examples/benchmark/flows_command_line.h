// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/flows_config.h"
#include "support/command_line.h"

#include <CLI/CLI.hpp>

#include <cstdint>
#include <string>

namespace benchmark {

namespace detail {

inline constexpr int64_t kMostSteps = 10000;
inline constexpr int64_t kMostInADim = 8192;

/// What the programs of flows have in common.
template <class AnyConfig>
void add_flow(CLI::App& app, AnyConfig& config, const char* depth) {
  using support::whole_number;
  app.option_defaults()->group("The flow");
  app.add_option("--depth", config.depths, depth)
      ->delimiter(',')
      ->transform(whole_number(1, kMostSteps));
  app.add_option("--width", config.width, "Channels inside of a branch")
      ->transform(whole_number(1, kMostInADim));
  app.add_option("--batch", config.batch, "Images in a step")
      ->transform(whole_number(1, kMostInADim));
  app.add_option("--size", config.size, "Height and width of an image")
      ->transform(whole_number(1, kMostInADim));
  app.add_option("--seed", config.seed, "Of weights and image")
      ->transform(support::seed());
}

template <class AnyConfig>
void add_flow_run(CLI::App& app, AnyConfig& config) {
  app.add_option(
         "--anchor-every",
         config.anchors,
         "Blocks from one kept result to the next, 3 blocks a step, 0 for none; "
         "comma-separated, each measured by itself")
      ->delimiter(',')
      ->transform(support::count_from(0));
  app.add_option("--threads", config.threads, "Threads on the CPU")
      ->transform(support::threads_from(1));
  app.add_flag("--json", config.json, "One JSON object a row, no table");
}

} // namespace detail

} // namespace benchmark
