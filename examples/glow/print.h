// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/trainer.h"
#include "train/data/images.h"
#include "train/run/run_state.h"
#include "train/run/say.h"
#include "train/step/memory_use.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/utils.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

// What people read on the terminal.

namespace glow {

/// Prints what a run is before its first step.
inline void print_banner(
    const Config& config,
    const training::DataSet& data,
    const training::RunState& state,
    Trainer& trainer) {
  const int threads = torch::get_num_threads();
  training::say(
      "glow on {}\n"
      "  flow      {} levels of {} steps of width {}, 1x1 {}, {} parameters\n"
      "  engine    {}, {}\n"
      "  data      {} training and {} test images, {} bits of each byte\n"
      "  training  iterations {} to {} of {} images each, seed {}, {}\n"
      "  computed  on {}, {} thread{}, in {}\n"
      "  results   {}\n",
      config.dataset,
      config.levels,
      config.steps,
      config.width,
      config.parametrization,
      trainer.parameter_count(),
      config.engine,
      is_plain(config) ? "all activations are kept"
          : config.anchor_every
          ? fmt::format("the stream kept every {} steps", config.anchor_every)
          : "no anchors",
      data.train.size(),
      data.test.size(),
      config.learn_bits,
      state.iteration + 1,
      config.iterations,
      config.batch_size,
      config.seed,
      state.iteration > 0 ? "weights of the checkpoint" : "random weights",
      trainer.device().str(),
      threads,
      threads == 1 ? "" : "s",
      config.amp ? "bfloat16 and float32" : "float32",
      config.results_dir);
}

/// Prints a row of the log, but for what only programs read.
inline void print_row(const nlohmann::ordered_json& row) {
  const auto mebibytes = [&](const char* field) {
    const auto& bytes = row.at(field);
    return bytes.is_null() ? 0 : training::to_mebibytes(bytes.get<int64_t>());
  };
  training::say(
      "iteration:{} loss:{:.4f} lr:{:g} ms_per_step:{:.1f} held_mib:{:.1f} "
      "peak_mib:{:.1f}",
      row.at("iteration").get<int64_t>(),
      row.at("loss").get<double>(),
      row.at("lr").get<double>(),
      row.at("ms_per_step").get<double>(),
      mebibytes("held_bytes"),
      mebibytes("peak_bytes"));
}

/// Prints an evaluation, and warns where the flow is not undone well enough for
/// its gradients to be trusted.
inline void print_evaluation(int64_t iteration, const Evaluation& evaluation) {
  constexpr double kLargestError = 1e-3; // a quarter of a byte's step
  const auto& [error, drift] = evaluation.round_trip;
  training::say(
      "iteration:{} test_bits_per_dim:{:.4f} reconstruction_error:{:.1e} "
      "drift:{:.1e}",
      iteration,
      evaluation.bits_per_dim,
      error,
      fmt::join(drift, ","));
  if (!(error <= kLargestError)) {
    training::print_warning(fmt::format(
        "images of iteration {} come back with errors up to {:.1e}: what the "
        "flow rebuilds, and its gradients, lose digits. Give a lower "
        "--anchor-every, or --parametrization orthogonal",
        iteration,
        error));
  }
}

inline void print_samples(const Config& config, const std::string& name) {
  training::say("samples: {}/{}", config.results_dir, name);
}

/// Prints the end of a run for people to read.
inline void print_summary(
    const Config& config,
    const training::RunState& state,
    Trainer& trainer,
    const Evaluation& evaluation) {
  training::say(
      "\nglow on {}, engine {}, batches of {} on {}\n"
      "  test images         {:8.4f} bits/dim\n"
      "  parameters          {:8.2f} MiB  ({})",
      config.dataset,
      config.engine,
      config.batch_size,
      trainer.device().str(),
      evaluation.bits_per_dim,
      training::to_mebibytes(trainer.parameter_bytes()),
      trainer.parameter_count());
  if (state.iteration > 0) {
    training::say(
        "  time per step       {:8.1f} ms   (median of {} steps)\n"
        "  held after forward  {:8.2f} MiB  (waits for backward)\n"
        "  peak of the step    {:8.2f} MiB  (beyond parameters, moments, "
        "batch)",
        state.milliseconds_per_step(),
        state.step_milliseconds.size(),
        training::to_mebibytes(state.memory.held_after_forward),
        training::to_mebibytes(state.memory.peak));
  }
}

} // namespace glow
