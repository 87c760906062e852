// SPDX-License-Identifier: MIT

// memcnn_benchmark: time and memory of one training step, by engine.

#include "benchmark/command_line.h"
#include "benchmark/config.h"
#include "benchmark/contest.h"
#include "benchmark/json_lines.h"
#include "benchmark/table.h"
#include "revnet/captured_step.h"
#include "support/allocator.h"
#include "support/error.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace {

std::vector<benchmark::Measurement> results_of(
    const benchmark::Config& config) {
  using namespace benchmark;
  std::vector<Measurement> results = config.coupling == "affine"
      ? Contest<Affine>(config).run()
      : Contest<Additive>(config).run();
  const auto& asked = config.engines;
  if (std::find(asked.begin(), asked.end(), "plain") == asked.end()) {
    results.erase(results.begin());
  }
  return results;
}

int run(const benchmark::Config& config) {
  if (config.device == "cuda" && !torch::cuda::is_available()) {
    throw support::Error(
        "expected a GPU that LibTorch can use for --device cuda, but found "
        "none. Give --device cpu.");
  }
  if (config.graph && !revnet::kHasCudaGraphs) {
    throw support::Error(
        "expected a program built with CUDA's headers for --graph, but got one "
        "without. Build it with a LibTorch with CUDA, where its toolkit is "
        "installed.");
  }
  if (!config.default_allocator) {
    support::keep_freed_memory();
  }
  at::set_num_threads(static_cast<int>(config.threads));
  at::globalContext().setAllowTF32CuDNN(config.precision == "tf32");
  const auto results = results_of(config);
  config.json ? benchmark::print_json(config, results)
              : benchmark::print_table(config, results);
  const bool failed = std::any_of(
      results.begin(), results.end(), [](const benchmark::Measurement& result) {
        return result.failed();
      });
  return failed ? 1 : 0;
}

} // namespace

int main(int argc, const char** argv) {
  try {
    const auto config = benchmark::parse_command_line(argc, argv);
    return config ? run(*config) : 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "memcnn_benchmark: {}\n", support::message_of(error));
    return 1;
  }
}
