// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "revnet/captured_step.h"
#include "support/error.h"
#include "train/base/interrupt.h"
#include "train/base/run_settings.h"
#include "train/data/images.h"
#include "train/run/out_of_memory.h"
#include "train/run/progress_line.h"
#include "train/run/run_state.h"
#include "train/run/say.h"
#include "train/run/step_figures.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/types.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace training {

/// A network and its plain twin, trained for the same steps from the same
/// weights. Of a program, the functions below need its Config, for which there
/// are plain_twin() and is_plain(), and its trainer, with step(), read() and
/// runs_ahead().
struct Comparison {
  RunState saving;
  RunState plain;
};

namespace detail {

/// Steps that are not timed: those of a GPU in which libraries start up and try
/// their algorithms, and the one that is captured.
template <class Trainer>
int64_t untimed_steps(const Trainer& trainer) {
  return trainer.runs_ahead() ? revnet::CapturedStepOptions().warm_up() + 1 : 0;
}

/// What the steps since the last call have to tell.
///
/// Throws:   Error if one of them had a loss that is not finite: what comes
///           after it are no steps to measure.
template <class Trainer>
StepSums sums_of_finite_steps(const RunSettings& config, Trainer& trainer) {
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
template <class Trainer>
RunState measured_steps(
    const RunSettings& config,
    Trainer& trainer,
    ProgressLine& progress) {
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
template <class Trainer, class Config>
std::optional<Comparison> compare_with_plain(
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
    const std::string& network,
    const RunSettings& config,
    const Comparison& comparison) {
  const auto& [saving, plain] = comparison;
  const auto row = [](const char* what, double ours, double theirs) {
    say("  {:<26}{:12.2f}{:12.2f}{:10.2f}", what, ours, theirs, ours / theirs);
  };
  say("\n{} and its plain twin, {} steps each from the same weights\n"
      "  {:<26}{:>12}{:>12}{:>10}",
      network,
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

/// Compares and prints it. Nothing where a signal asks to stop, or where that
/// fails, such as for want of memory, of which the plain twin takes more than
/// all before: the run can do without.
template <class Trainer, class Config>
std::optional<Comparison> try_to_compare(
    const std::string& network,
    const Config& config,
    const DataSet& data,
    torch::Device device,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  std::string reason;
  try {
    auto comparison =
        compare_with_plain<Trainer>(config, data, device, meter, progress);
    if (comparison) {
      print_comparison(network, config, *comparison);
    }
    return comparison;
  } catch (const c10::Error& error) {
    reason = reason_of(error);
  } catch (const support::Error& error) {
    reason = error.what();
  }
  progress.clear();
  print_warning("the comparison is left out: " + reason);
  return std::nullopt;
}

/// What a comparison has come to, as the results have it.
inline nlohmann::ordered_json comparison_figures(
    const RunSettings& config,
    const Comparison& comparison) {
  return {
      {"steps", config.compare_plain},
      {config.engine, step_figures(comparison.saving)},
      {"plain", step_figures(comparison.plain)}};
}

} // namespace training
