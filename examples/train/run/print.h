// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/libtorch/device_memory.h"
#include "train/numerics/numerics.h"
#include "train/run/run_state.h"
#include "train/run/say.h"
#include "train/step/step_result.h"
#include "train/step/trainer.h"

#include <c10/util/StringUtil.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstdint>

namespace training {

/// Prints a row of the log, but for what only programs read.
inline void print_row(const nlohmann::ordered_json& row) {
  const auto number = [&](const char* field) {
    return row.at(field).get<double>();
  };
  say("iteration:{} loss:{:.4f} accuracy:{:.4f} top5:{:.4f} lr:{:g} "
      "ms_per_step:{:.1f}",
      row.at("iteration").get<int64_t>(),
      number("loss"),
      number("accuracy"),
      number("top5"),
      number("lr"),
      number("ms_per_step"));
}

/// Prints what the budget of a network keeps, if it has one.
inline void print_kept(const Config& config, const Trainer& trainer) {
  if (config.memory_budget > 0) {
    say("kept for backward: {}", c10::str(kept_by(trainer.network())));
  }
}

inline void print_evaluation(int64_t iteration, const Evaluation& evaluation) {
  say("iteration:{} test_loss:{:.4f} test_accuracy:{:.4f} test_top5:{:.4f}",
      iteration,
      evaluation.loss,
      evaluation.accuracy,
      evaluation.top5);
}

inline void print_numerics(int64_t iteration, const NumericsReport& report) {
  const Deviation inverse = report.inverse();
  say("iteration:{} inverse_error:{:.2e} inverse_error_block:{} "
      "gradient_deviation:{:.2e} gradient_deviation_parameter:{}",
      iteration,
      inverse.relative,
      inverse.name,
      report.gradient.relative,
      report.gradient.name);
}

/// Prints the end of a run for people to read.
inline void print_summary(
    const Config& config,
    const RunState& state,
    const Trainer& trainer,
    const Evaluation& evaluation) {
  say("\n{} on {}, engine {}, batches of {} on {}\n"
      "  test accuracy       {:8.2f} %    (among the first five: {:.2f} %)\n"
      "  parameters          {:8.2f} MiB  ({})",
      config.model,
      config.dataset,
      config.engine,
      config.batch_size,
      trainer.device().str(),
      100 * evaluation.accuracy,
      100 * evaluation.top5,
      to_mebibytes(trainer.parameter_bytes()),
      trainer.parameter_count());
  if (state.iteration > 0) {
    say("  time per step       {:8.1f} ms   (median of {} steps{})",
        state.milliseconds_per_step(),
        state.step_milliseconds.size(),
        trainer.runs_ahead() ? ", timed row by row" : "");
  }
  if (state.memory.peak > 0) { // a GPU's first step is not measured
    say("  held after forward  {:8.2f} MiB  (waits for backward)\n"
        "  peak of the step    {:8.2f} MiB  (beyond parameters, momentum, "
        "batch)",
        to_mebibytes(state.memory.held_after_forward),
        to_mebibytes(state.memory.peak));
  }
  if (trainer.device().is_cuda()) {
    say("  taken of the GPU    {:8.2f} MiB  (by all of the run, at its end)",
        to_mebibytes(taken_bytes(trainer.device())));
  }
}

} // namespace training
