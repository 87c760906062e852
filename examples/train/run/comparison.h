// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "revnet/captured_step.h"
#include "train/base/config.h"
#include "train/data/images.h"
#include "train/run/interrupt.h"
#include "train/run/print.h"
#include "train/run/progress_line.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/network.h"
#include "train/step/trainer.h"

#include <fmt/format.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace training {

/// A network and its plain twin, trained for the same steps from the same
/// weights.
struct Comparison {
  RunState saving;
  RunState plain;
};

namespace detail {

/// Steps that are not timed: those of a GPU in which libraries start up and try
/// their algorithms, and the one that is captured.
inline int64_t untimed_steps(const Trainer& trainer) {
  return trainer.runs_ahead() ? revnet::CapturedStepOptions().warm_up() + 1 : 0;
}

/// What the timed steps of a network come to, and the memory of all.
inline RunState
measured_steps(const Config& config, Trainer& trainer, ProgressLine& progress) {
  RunState state;
  const int64_t untimed = untimed_steps(trainer);
  const int64_t steps = untimed + config.compare_plain;
  for (int64_t i = 0; i < steps && interrupted() == 0; ++i) {
    progress.show(fmt::format(
        "measuring engine {}: step {} of {}", config.engine, i + 1, steps));
    trainer.step(i);
    if (i + 1 == untimed) {
      state.memory.include(trainer.read().sums.memory);
    } else if (!trainer.runs_ahead() || i + 1 == steps) {
      state.add(trainer.read().sums);
    }
  }
  return state;
}

} // namespace detail

/// Trains the twins one after the other, as many steps as the configuration
/// says. Nothing where a signal asks to stop.
inline std::optional<Comparison> compare_with_plain(
    const Config& config,
    const DataSet& data,
    torch::Device device,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  const auto train = [&](const Config& twin) {
    const memcnn::PlainAutogradGuard plain(is_plain(twin));
    Trainer trainer(twin, data, device, meter);
    return detail::measured_steps(twin, trainer, progress);
  };
  Comparison comparison{train(config), train(plain_twin(config))};
  progress.clear();
  if (interrupted() != 0) {
    return std::nullopt;
  }
  return comparison;
}

inline void print_comparison(
    const Config& config,
    const Comparison& comparison) {
  const auto& [saving, plain] = comparison;
  const auto row = [](const char* what, double ours, double theirs) {
    say("  {:<26}{:12.2f}{:12.2f}{:10.2f}", what, ours, theirs, ours / theirs);
  };
  say("\n{} and its plain twin, {} steps each from the same weights\n"
      "  {:<26}{:>12}{:>12}{:>10}",
      config.model,
      saving.iteration,
      "",
      config.engine,
      "plain",
      "ratio");
  row("held after forward (MiB)",
      to_mebibytes(saving.memory.held_after_forward),
      to_mebibytes(plain.memory.held_after_forward));
  row("peak of the step (MiB)",
      to_mebibytes(saving.memory.peak),
      to_mebibytes(plain.memory.peak));
  row("time per step (ms)",
      saving.milliseconds_per_step(),
      plain.milliseconds_per_step());
  row("loss, mean of the steps",
      saving.since_row.loss / static_cast<double>(saving.iteration),
      plain.since_row.loss / static_cast<double>(plain.iteration));
}

} // namespace training
