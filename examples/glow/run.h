// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/print.h"
#include "glow/results.h"
#include "glow/trainer.h"
#include "support/error.h"
#include "train/base/interrupt.h"
#include "train/run/checkpoint.h"
#include "train/run/progress_line.h"
#include "train/run/run_files.h"
#include "train/run/run_state.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace glow {

/// A run from where it begins to its last iteration or an interrupt: steps, and
/// what is printed, logged, drawn and saved between them.
class Run final {
 public:
  /// `state` is where the run begins, and `fingerprint` that of its images.
  Run(const Config& config,
      uint32_t fingerprint,
      training::RunState state,
      Trainer& trainer,
      training::RunFiles& files,
      training::ProgressLine& progress)
      : config_(config),
        fingerprint_(fingerprint),
        state_(std::move(state)),
        begun_(state_.iteration),
        saved_(state_.iteration),
        trainer_(trainer),
        files_(files),
        progress_(progress) {}

  /// Trains until the last iteration is done or a signal asks to stop.
  void train() {
    for (;;) {
      // Not only after a step: an interrupt may have come before the row that
      // belongs to it was complete.
      if (row_is_due() && state_.since_row.steps > 0) {
        write_row();
      }
      const bool stop = state_.iteration == config_.iterations ||
          training::interrupted() != 0;
      if (stop || is_due_every(config_.checkpoint_every)) {
        save();
      }
      if (stop) {
        return;
      }
      step();
    }
  }

  /// On the test images; nothing where a signal asks to stop.
  std::optional<Evaluation> evaluate() {
    const auto evaluation = trainer_.evaluate([&](double share) {
      progress_.show(fmt::format("evaluating: {:.0f} %", 100 * share));
      return training::interrupted() == 0;
    });
    progress_.clear();
    return evaluation;
  }

  const training::RunState& state() const {
    return state_;
  }

 private:
  void step() {
    trainer_.step(state_.iteration);
    const training::StepReport report = trainer_.read();
    state_.add(report.sums);
    if (report.bad_loss) {
      stop_on_bad("loss", *report.bad_loss, state_.iteration + 1);
    }
    if (state_.iteration == begun_ + 1 && !row_is_due()) {
      progress_.clear();
      print_row(make_row(config_, state_)); // people wait for a first sign
    }
    const auto left =
        static_cast<double>(config_.iterations - state_.iteration);
    progress_.show(fmt::format(
        "iteration {} of {}, {:.4f} bits/dim, {} left",
        state_.iteration,
        config_.iterations,
        report.sums.loss,
        training::remaining_time(report.sums.milliseconds * left)));
  }

  bool is_due_every(int64_t steps) const {
    return steps > 0 && state_.iteration % steps == 0;
  }

  /// Not at the end, where there come a last evaluation and a last sheet.
  bool is_due_before_the_end(int64_t steps) const {
    return state_.iteration < config_.iterations && is_due_every(steps);
  }

  bool row_is_due() const {
    return state_.iteration == config_.iterations ||
        is_due_every(config_.log_every) ||
        is_due_every(config_.evaluate_every) ||
        is_due_every(config_.sample_every);
  }

  /// Nothing is written where a signal asks to stop before it is complete.
  void write_row() {
    nlohmann::ordered_json row = make_row(config_, state_);
    std::optional<Evaluation> evaluation;
    if (is_due_before_the_end(config_.evaluate_every)) {
      evaluation = evaluate();
      if (!evaluation) {
        return;
      }
      row.update(to_json(*evaluation));
    }
    progress_.clear();
    print_row(row);
    if (evaluation) {
      print_evaluation(state_.iteration, *evaluation);
    }
    if (is_due_before_the_end(config_.sample_every)) {
      row["samples"] =
          write_samples(files_.folder(), state_.iteration, trainer_);
      print_samples(config_, row["samples"]);
    }
    files_.log().add(row);
    state_.since_row = training::StepSums();
  }

  void save() {
    if (state_.iteration == saved_) {
      return;
    }
    if (!trainer_.weights_are_finite()) {
      stop_on_bad("weights", NAN, state_.iteration);
    }
    state_.log = files_.log().mark();
    files_.checkpoints().write(
        training::make_checkpoint(config_, fingerprint_, state_, trainer_));
    saved_ = state_.iteration;
  }

  [[noreturn]] void
  stop_on_bad(const char* what, double value, int64_t iteration) {
    progress_.clear();
    const auto& checkpoints = files_.checkpoints();
    throw support::Error(fmt::format(
        "expected the {} to be finite, but got {:g} at iteration {}. Give a "
        "lower --learning-rate (now {:g}), or a longer --warm-up (now {}){}",
        what,
        value,
        iteration,
        config_.learning_rate,
        config_.warm_up,
        checkpoints.has_last()
            ? fmt::format(
                  ", with --fresh, or with another --results-dir: the last good "
                  "checkpoint stays in {} until then.",
                  checkpoints.last().string())
            : "."));
  }

  const Config& config_;
  uint32_t fingerprint_;
  training::RunState state_;
  int64_t begun_; // where this program has taken the run up
  int64_t saved_; // iteration of the last checkpoint
  Trainer& trainer_;
  training::RunFiles& files_;
  training::ProgressLine& progress_;
};

} // namespace glow
