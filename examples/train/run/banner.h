// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/data/data_set.h"
#include "train/data/images.h"
#include "train/run/machine_load.h"
#include "train/run/print.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/trainer.h"
#include "train/team/team.h"

#include <fmt/format.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <optional>
#include <string>

namespace training {

namespace detail {

inline std::string source_of_data(const Config& config) {
  const auto files = dataset_files(config);
  return files.empty() ? "made by the program"
                       : "from " + files.front().parent_path().string();
}

inline std::string source_of_weights(
    const Config& config,
    const RunState& state) {
  return state.iteration > 0        ? "weights of the checkpoint"
      : config.load_weights.empty() ? "random weights"
                                    : "weights from " + config.load_weights;
}

inline std::string steps_to_come(const Config& config, const RunState& state) {
  if (state.iteration == config.iterations) {
    return config.iterations == 0 ? "none: evaluation only"
                                  : "done: evaluation only";
  }
  return fmt::format(
      "iterations {} to {} of {} images each, seed {}, {}",
      state.iteration + 1,
      config.iterations,
      config.batch_size,
      config.seed,
      source_of_weights(config, state));
}

inline std::string precision(const Config& config) {
  std::string text = config.amp ? "bfloat16 and float32" : "float32";
  if (config.fractional_bits) {
    text += fmt::format(
        ", blocks in multiples of 2^-{}", config.fractional_bits.value());
  }
  return text;
}

/// Who shares a batch; empty where nobody does.
inline std::string processes(const Config& config, const Team& team) {
  if (!config.distributed) {
    return "";
  }
  return fmt::format(
      "  processes {}, each on {} images of a batch, gradients averaged by {}\n",
      team.size(),
      config.batch_size / team.size(),
      team.backend());
}

/// How the steps of a GPU run; empty for a CPU.
inline std::string launching(const Config& config, torch::Device device) {
  if (!device.is_cuda()) {
    return "";
  }
  return fmt::format(
      ", {}{}",
      uses_graph(config, device) ? "a step as one graph" : "kernel by kernel",
      config.deterministic ? ", deterministic" : "");
}

} // namespace detail

/// Prints what a run is before its first step: what is not as it was meant can
/// be stopped before it has cost anything.
inline void print_banner(
    const Config& config,
    const DataSet& data,
    const RunState& state,
    const Trainer& trainer) {
  const int threads = torch::get_num_threads();
  // The other processes of the run would count as programs of others.
  const auto hint = trainer.device().is_cpu() && !config.distributed
      ? hint_on_load(threads)
      : std::nullopt;
  say("{} on {}\n"
      "  network   {} parameters ({:.2f} MiB), engine {}\n"
      "  data      {} training and {} test images of {} classes, {}\n"
      "  training  {}\n"
      "  computed  on {}, {} thread{}, in {}, {}{}\n"
      "{}"
      "  results   {}\n"
      "{}",
      config.model,
      config.dataset,
      trainer.parameter_count(),
      to_mebibytes(trainer.parameter_bytes()),
      config.engine,
      data.train.size(),
      data.test.size(),
      data.num_classes,
      detail::source_of_data(config),
      detail::steps_to_come(config, state),
      trainer.device().str(),
      threads,
      threads == 1 ? "" : "s",
      detail::precision(config),
      config.memory_format,
      detail::launching(config, trainer.device()),
      detail::processes(config, trainer.team()),
      config.results_dir,
      hint ? fmt::format("  busy      {}\n", *hint) : "");
}

} // namespace training
