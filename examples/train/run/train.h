// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "support/error.h"
#include "train/base/config.h"
#include "train/data/data_set.h"
#include "train/numerics/non_finite.h"
#include "train/numerics/numerics.h"
#include "train/run/checkpoint.h"
#include "train/run/checkpoint_files.h"
#include "train/run/interrupt.h"
#include "train/run/log.h"
#include "train/run/report.h"
#include "train/run/results_dir.h"
#include "train/run/run_state.h"
#include "train/step/trainer.h"
#include "train/weights/python_weights.h"

#include <c10/util/Exception.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>

namespace training {

namespace detail {

inline bool is_due(int64_t iteration, int64_t every) {
  return every > 0 && iteration % every == 0;
}

inline void keep_first(Images& images, int64_t count) {
  if (count > 0 && count < images.size()) {
    images.pixels = images.pixels.narrow(0, 0, count);
    images.labels = images.labels.narrow(0, 0, count);
  }
}

/// Trains network and plain twin side by side for some steps.
inline nlohmann::ordered_json compare_with_plain(
    const Config& config,
    const DataSet& data,
    torch::Device device,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  const auto measure = [&](const Config& twin) {
    Trainer trainer(twin, data, device, meter);
    RunState state;
    while (state.iteration < config.compare_plain && interrupted() == 0) {
      progress.show(format(
          "measuring engine %s: step %lld of %lld",
          twin.engine.c_str(),
          static_cast<long long>(state.iteration + 1),
          static_cast<long long>(config.compare_plain)));
      state.add(trainer.step(state.iteration));
    }
    return state;
  };
  const RunState saving = measure(config);
  const RunState plain = measure(plain_twin(config));
  progress.clear();
  if (interrupted() != 0) {
    return nullptr;
  }
  print_comparison(config, saving, plain);
  return {
      {"steps", config.compare_plain},
      {config.engine, measured(saving)},
      {"plain", measured(plain)}};
}

} // namespace detail

/// One run in its results directory, from its start or from its last checkpoint
/// to its end or an interrupt.
class Run {
 public:
  /// Throws:   Error if the checkpoint in the directory is not one to go on
  ///           from; the directory is then as it was.
  Run(const Config& config,
      const DataSet& data,
      const std::string& fingerprint,
      const ResultsDir& directory,
      Trainer& trainer,
      ProgressLine& progress)
      : config_(config),
        fingerprint_(fingerprint),
        checkpoints_(directory.path()),
        trainer_(trainer),
        progress_(progress) {
    if (!config.fresh &&
        (config.from_previous || is_there(checkpoints_.last()))) {
      resume();
    } else {
      if (!config.load_weights.empty()) {
        load_python_weights(
            config.load_weights, config.model, trainer.network());
      }
      checkpoints_.remove();
    }
    // What is there of another run, or of an earlier end of this one.
    std::error_code ignored;
    std::filesystem::remove(directory.path() / "results.json", ignored);
    write_run(
        directory.path() / "run.json", config, data, fingerprint, trainer);
    log_.emplace(directory.path() / "log.jsonl", state_.rows);
  }

  /// Trains until the last iteration is done or a signal asks to stop.
  void train() {
    for (;;) {
      // Not only after a step: an interrupt may have come before the row that
      // belongs to it was complete.
      if (row_is_due() && state_.since_row.steps > 0) {
        write_row();
      }
      const bool stop =
          state_.iteration == config_.iterations || interrupted() != 0;
      if (stop || detail::is_due(state_.iteration, config_.checkpoint_every)) {
        save();
      }
      if (stop) {
        return;
      }
      step();
    }
  }

  /// On the test images; incomplete where a signal asks to stop.
  Evaluation evaluate() {
    const Evaluation evaluation = trainer_.evaluate([&](double share) {
      progress_.show(format("evaluating: %.0f %%", 100 * share));
      return interrupted() == 0;
    });
    progress_.clear();
    return evaluation;
  }

  const RunState& state() const {
    return state_;
  }

 private:
  void resume() {
    const auto& path =
        config_.from_previous ? checkpoints_.previous() : checkpoints_.last();
    state_ = restore_checkpoint(
        checkpoints_.read(path), path, config_, fingerprint_, trainer_);
    if (config_.from_previous) {
      checkpoints_.go_back();
    }
    saved_ = state_.iteration;
    progress_.clear();
    std::printf(
        "going on from %s at iteration %lld\n",
        path.string().c_str(),
        static_cast<long long>(state_.iteration));
    if (!config_.load_weights.empty()) {
      std::printf(
          "not reading %s: the run started from it\n",
          config_.load_weights.c_str());
    }
    std::fflush(stdout);
  }

  void step() {
    const StepResult step = trainer_.step(state_.iteration);
    if (!std::isfinite(step.loss)) {
      stop_on_bad("loss", step.loss, state_.iteration + 1);
    }
    state_.add(step);
    progress_.show(format(
        "iteration %lld of %lld, loss %.4f, %s left",
        static_cast<long long>(state_.iteration),
        static_cast<long long>(config_.iterations),
        step.loss,
        remaining_time(
            step.milliseconds *
            static_cast<double>(config_.iterations - state_.iteration))
            .c_str()));
  }

  bool evaluation_is_due() const {
    return state_.iteration < config_.iterations && // there comes a last one
        detail::is_due(state_.iteration, config_.evaluate_every);
  }

  bool check_is_due() const {
    return detail::is_due(state_.iteration, config_.check_inverse);
  }

  bool row_is_due() const {
    return state_.iteration == config_.iterations || evaluation_is_due() ||
        check_is_due() || detail::is_due(state_.iteration, config_.log_every);
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
      print_warning(
          "the check of iteration " + std::to_string(state_.iteration) +
          " is left out: " + error.what_without_backtrace());
      return std::nullopt;
    }
  }

  /// Nothing is written where a signal asks to stop before it is complete.
  void write_row() {
    nlohmann::ordered_json row = make_row(config_, state_);
    std::optional<Evaluation> evaluation;
    if (evaluation_is_due()) {
      evaluation = evaluate();
      if (interrupted() != 0) {
        return;
      }
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
    log_->add(row);
    state_.rows.push_back(row);
    state_.since_row = SinceRow();
  }

  void save() {
    if (state_.iteration == saved_) {
      return;
    }
    if (!trainer_.weights_are_finite()) {
      stop_on_bad("weights", NAN, state_.iteration);
    }
    checkpoints_.write(
        make_checkpoint(config_, fingerprint_, state_, trainer_));
    saved_ = state_.iteration;
  }

  [[noreturn]] void
  stop_on_bad(const char* what, double value, int64_t iteration) {
    const std::string origin = origin_of_non_finite(
        trainer_.network(), trainer_.batch(iteration - 1), config_.amp);
    progress_.clear();
    throw support::Error(
        std::string("expected the ") + what + " to be finite, but got " +
        format("%g", value) + " at iteration " + std::to_string(iteration) +
        (origin.empty()
             ? ""
             : ". The first value that is not finite is in " + origin) +
        ". Give a lower --learning-rate (now " +
        format("%g", config_.learning_rate) + ")" +
        (is_there(checkpoints_.last())
             ? "; the last good checkpoint stays in " +
                 checkpoints_.last().string() + "."
             : "."));
  }

  const Config& config_;
  std::string fingerprint_;
  CheckpointFiles checkpoints_;
  Trainer& trainer_;
  ProgressLine& progress_;
  std::optional<Log> log_;
  RunState state_;
  int64_t saved_ = 0; // iteration of the last checkpoint
};

/// Trains, evaluates and reports as the configuration says. Returns the exit
/// code: 0, or 128 + the signal that stopped the run.
///
/// Throws:   Error for all that the user can put right.
inline int train(const Config& config) {
  const torch::Device device = config.use_cuda && torch::cuda::is_available()
      ? torch::kCUDA
      : torch::kCPU;
  if (config.threads > 0) {
    torch::set_num_threads(config.threads);
  }
  // From here on, so that every tensor of the program is known to the meter.
  memcnn::AllocationMeter meter(device.type());
  ProgressLine progress;

  progress.show("reading " + config.dataset);
  DataSet data = load_dataset(config);
  const std::string images = fingerprint(data);
  detail::keep_first(data.test, config.test_images);
  const ResultsDir directory(config.results_dir);
  if (!config.save_weights.empty()) {
    check_writable(config.save_weights, "--save-weights");
  }

  Trainer trainer(config, data, device, meter);
  Run run(config, data, images, directory, trainer, progress);
  run.train();

  Evaluation evaluation;
  if (interrupted() == 0) {
    evaluation = run.evaluate();
  }
  nlohmann::ordered_json comparison;
  if (interrupted() == 0) {
    print_evaluation(run.state().iteration, evaluation);
    print_summary(config, run.state(), trainer, evaluation);
    if (config.compare_plain > 0) {
      comparison =
          detail::compare_with_plain(config, data, device, meter, progress);
    }
  }
  progress.clear();
  if (interrupted() != 0) {
    std::printf(
        "stopped at iteration %lld; the same command without --fresh goes on "
        "from there\n",
        static_cast<long long>(run.state().iteration));
    return 128 + interrupted();
  }
  const auto results = directory.path() / "results.json";
  write_results(results, config, run.state(), trainer, evaluation, comparison);
  std::printf("\nresults: %s\n", results.string().c_str());
  if (!config.save_weights.empty()) {
    save_python_weights(config.save_weights, trainer.network());
    std::printf("weights: %s\n", config.save_weights.c_str());
  }
  return 0;
}

} // namespace training
