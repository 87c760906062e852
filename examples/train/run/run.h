// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/numerics/non_finite.h"
#include "train/numerics/numerics.h"
#include "train/numerics/warnings.h"
#include "train/run/checkpoint.h"
#include "train/run/out_of_memory.h"
#include "train/run/print.h"
#include "train/run/progress_line.h"
#include "train/run/results.h"
#include "train/run/run_files.h"
#include "train/run/run_state.h"
#include "train/step/largest_memory.h"
#include "train/step/memory_use.h"
#include "train/step/step_result.h"
#include "train/step/trainer.h"
#include "train/team/team.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace training {

/// A run from where it begins to its last iteration or an interrupt: steps, and
/// what is printed, logged and saved between them, by the leader of its team.
class Run final {
 public:
  /// `state` is where the run begins, and `fingerprint` that of its images.
  /// `files` are none but for the leader.
  Run(const Config& config,
      uint32_t fingerprint,
      RunState state,
      Trainer& trainer,
      RunFiles* files,
      ProgressLine& progress)
      : config_(config),
        fingerprint_(fingerprint),
        state_(std::move(state)),
        begun_(state_.iteration),
        saved_(state_.iteration),
        trainer_(trainer),
        team_(trainer.team()),
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
      const bool stop =
          state_.iteration == config_.iterations || team_.stop_signal() != 0;
      if (stop || is_due_every(config_.checkpoint_every)) {
        save();
      }
      if (stop) {
        return;
      }
      advance();
    }
  }

  /// On the test images; nothing where a signal asks to stop.
  std::optional<Evaluation> evaluate() {
    const auto evaluation = trainer_.evaluate([&](double share) {
      progress_.show(fmt::format("evaluating: {:.0f} %", 100 * share));
      return team_.stop_signal() == 0;
    });
    progress_.clear();
    if (files_ && evaluation && !std::isfinite(evaluation->loss)) {
      warn_of_evaluation(*evaluation);
    }
    return evaluation;
  }

  const RunState& state() const {
    return state_;
  }

 private:
  /// Steps and reads what they have to tell: the next one or, where they run
  /// ahead, those up to where that is needed.
  void advance() {
    const int64_t end =
        trainer_.runs_ahead() ? next_due() : state_.iteration + 1;
    int64_t begun = state_.iteration;
    for (;;) {
      trainer_.step(begun++);
      if (begun == end || team_.stop_signal() != 0) {
        break;
      }
      show_progress(begun);
    }
    read();
    show_progress(begun);
  }

  void read() {
    const StepReport report = trainer_.read();
    state_.add(report.sums);
    last_ = report.sums;
    if (report.bad_loss) {
      const int64_t iteration = state_.iteration + 1;
      stop_on_bad(
          "loss", *report.bad_loss, iteration, origin_of_all(iteration));
    }
    if (files_ && state_.iteration == begun_ + 1) {
      progress_.clear();
      print_kept(config_, trainer_);
      if (!row_is_due()) {
        print_row(make_row(config_, state_)); // people wait for a first sign
      }
    }
  }

  /// By what was read last.
  void show_progress(int64_t iteration) {
    if (last_.steps == 0) {
      return;
    }
    const auto steps = static_cast<double>(last_.steps);
    const auto left = static_cast<double>(config_.iterations - iteration);
    progress_.show(fmt::format(
        "iteration {} of {}, loss {:.4f}, {} left",
        iteration,
        config_.iterations,
        last_.loss / steps,
        remaining_time(last_.milliseconds / steps * left)));
  }

  /// The next iteration at which there is more to do than to step.
  int64_t next_due() const {
    if (state_.iteration == begun_) {
      return begun_ + 1; // the first sign
    }
    int64_t next = config_.iterations;
    for (const int64_t every :
         {config_.log_every,
          config_.evaluate_every,
          config_.check_inverse,
          config_.checkpoint_every}) {
      if (every > 0) {
        next = std::min(next, (state_.iteration / every + 1) * every);
      }
    }
    return next;
  }

  void warn_of_evaluation(const Evaluation& evaluation) {
    const std::string origin = origin_of_non_finite(
        trainer_.network(),
        trainer_.test_batch(evaluation.not_finite_from.value_or(0)),
        config_.amp);
    print_warning(
        fmt::format(
            "the test loss of iteration {} is {:g}, and its accuracy says nothing",
            state_.iteration,
            evaluation.loss) +
        (origin.empty()
             ? ""
             : ". The first value that is not finite is in " + origin));
  }

  bool is_due_every(int64_t steps) const {
    return steps > 0 && state_.iteration % steps == 0;
  }

  bool evaluation_is_due() const {
    return state_.iteration < config_.iterations && // there comes a last one
        is_due_every(config_.evaluate_every);
  }

  bool check_is_due() const {
    return is_due_every(config_.check_inverse);
  }

  bool row_is_due() const {
    return state_.iteration == config_.iterations || evaluation_is_due() ||
        check_is_due() || is_due_every(config_.log_every);
  }

  /// On the last batch, with the weights after it. Nothing where it fails, such
  /// as for want of memory: the run can do without.
  std::optional<NumericsReport> check() {
    progress_.show("checking inverses and gradients");
    try {
      return measure_numerics(
          trainer_.network(),
          trainer_.batch(state_.iteration - 1),
          config_.amp);
    } catch (const c10::Error& error) {
      progress_.clear();
      print_warning(fmt::format(
          "the check of iteration {} is left out: {}",
          state_.iteration,
          reason_of(error)));
      return std::nullopt;
    }
  }

  /// Nothing is written where a signal asks to stop before it is complete.
  void write_row() {
    std::optional<Evaluation> evaluation;
    if (evaluation_is_due() && !(evaluation = evaluate())) {
      return;
    }
    take_largest_memory();
    if (files_) {
      write_row(evaluation);
    }
    state_.since_row = StepSums();
  }

  void write_row(const std::optional<Evaluation>& evaluation) {
    nlohmann::ordered_json row = make_row(config_, state_);
    if (evaluation) {
      row["test_loss"] = evaluation->loss;
      row["test_accuracy"] = evaluation->accuracy;
      row["test_top5"] = evaluation->top5;
    }
    std::optional<NumericsReport> numerics;
    if (check_is_due() && (numerics = check())) {
      row.update(to_json(*numerics));
    }
    progress_.clear();
    print_row(row);
    if (numerics) {
      print_numerics(state_.iteration, *numerics);
      for (const auto& text :
           warnings_of(*numerics, config_, state_.iteration)) {
        print_warning(text);
      }
    }
    if (evaluation) {
      print_evaluation(state_.iteration, *evaluation);
    }
    files_->log().add(row);
  }

  /// What rows, results and checkpoints say of memory is of the process that
  /// takes the most.
  void take_largest_memory() {
    for (MemoryUse* use : {&state_.since_row.memory, &state_.memory}) {
      *use = largest_of_all(*use, team_);
    }
  }

  void save() {
    if (state_.iteration == saved_) {
      return;
    }
    if (!trainer_.weights_are_finite()) {
      stop_on_bad(
          "weights", NAN, state_.iteration, own_origin(state_.iteration));
    }
    take_largest_memory();
    if (files_) {
      state_.log = files_->log().mark();
      files_->checkpoints().write(
          make_checkpoint(config_, fingerprint_, state_, trainer_));
    }
    saved_ = state_.iteration;
  }

  [[noreturn]] void stop_on_bad(
      const char* what,
      double value,
      int64_t iteration,
      const std::string& origin) {
    progress_.clear();
    throw SharedError(
        fmt::format(
            "expected the {} to be finite, but got {:g} at iteration {}",
            what,
            value,
            iteration) +
        (origin.empty()
             ? ""
             : ". The first value that is not finite is in " + origin) +
        ". " + cure_of_bad());
  }

  /// By the slice of this process.
  std::string own_origin(int64_t iteration) {
    return origin_of_non_finite(
        trainer_.network(), trainer_.batch(iteration - 1), config_.amp);
  }

  /// By the slices of all: it may be that of one alone.
  std::string origin_of_all(int64_t iteration) {
    const std::string own = own_origin(iteration);
    for (const std::string& origin : team_.from_all(own)) {
      if (!origin.empty() && origin != kFiniteLogits) {
        return origin;
      }
    }
    return own;
  }

  std::string cure_of_bad() const {
    if (state_.iteration == 0 && !config_.load_weights.empty()) {
      return fmt::format(
          "Give another --load-weights: no step has changed those of {} yet.",
          config_.load_weights);
    }
    const auto cure = fmt::format(
        "Give a lower --learning-rate (now {:g})", config_.learning_rate);
    // Which is of the old rate: a run goes on from it under no other.
    return !files_ || !files_->checkpoints().has_last()
        ? cure + "."
        : fmt::format(
              "{} with --fresh, or with another --results-dir: the last good "
              "checkpoint stays in {} until then.",
              cure,
              files_->checkpoints().last().string());
  }

  const Config& config_;
  uint32_t fingerprint_;
  RunState state_;
  int64_t begun_; // where this program has taken the run up
  int64_t saved_; // iteration of the last checkpoint
  StepSums last_; // what was read last
  Trainer& trainer_;
  Team& team_;
  RunFiles* files_; // none but for the leader
  ProgressLine& progress_;
};

} // namespace training
