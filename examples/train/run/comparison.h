// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "revnet/captured_step.h"
#include "support/error.h"
#include "train/base/config.h"
#include "train/base/interrupt.h"
#include "train/data/images.h"
#include "train/run/print.h"
#include "train/run/progress_line.h"
#include "train/run/run_state.h"
#include "train/step/memory_use.h"
#include "train/step/network.h"
#include "train/step/step_result.h"
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

/// What the steps since the last call have to tell.
///
/// Throws:   Error if one of them had a loss that is not finite: what comes
///           after it are no steps to measure.
inline StepSums sums_of_finite_steps(const Config& config, Trainer& trainer) {
  const StepReport report = trainer.read();
  if (report.bad_loss) {
    throw support::Error(fmt::format(
        "expected the loss of engine {} to be finite, but got {:g}. Give a lower "
        "--learning-rate (now {:g}).",
        config.engine,
        *report.bad_loss,
        config.learning_rate));
  }
  return report.sums;
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
      state.memory.include(sums_of_finite_steps(config, trainer).memory);
    } else if (!trainer.runs_ahead() || i + 1 == steps) {
      state.add(sums_of_finite_steps(config, trainer));
    }
  }
  return state;
}

} // namespace detail

/// Trains the twins one after the other, as many steps as the configuration
/// says. Nothing where a signal asks to stop.
///
/// Throws:   Error if a loss is not finite.
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
