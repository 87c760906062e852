// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>

#include "checkpoint.h"
#include "config.h"
#include "data_set.h"
#include "error.h"
#include "files.h"
#include "interrupt.h"
#include "report.h"
#include "run_state.h"
#include "trainer.h"

#include <torch/cuda.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

namespace training {

namespace detail {

inline bool is_due(int64_t iteration, int64_t every) {
  return every > 0 && iteration % every == 0;
}

[[noreturn]] inline void stop_on_bad_loss(
    const std::string& what,
    double loss,
    const Config& config,
    int64_t iteration,
    const std::filesystem::path& checkpoint) {
  std::error_code error;
  throw Error(
      "expected the " + what + " to be finite, but got " + format("%g", loss) +
      " at iteration " + std::to_string(iteration) +
      ". Give a lower --learning-rate (now " +
      format("%g", config.learning_rate) + ")" +
      (std::filesystem::exists(checkpoint, error)
           ? "; the last good checkpoint stays in " + checkpoint.string() + "."
           : "."));
}

inline Evaluation evaluate(Trainer& trainer, ProgressLine& progress) {
  return trainer.evaluate([&](double share) {
    progress.show(format("evaluating: %.0f %%", 100 * share));
    return interrupted() == 0;
  });
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
  if (config.test_images > 0 && config.test_images < data.test.size()) {
    data.test.pixels = data.test.pixels.narrow(0, 0, config.test_images);
    data.test.labels = data.test.labels.narrow(0, 0, config.test_images);
  }
  for (Images* images : {&data.train, &data.test}) {
    images->pixels = images->pixels.to(device);
    images->labels = images->labels.to(device);
  }
  const std::filesystem::path directory = config.results_dir;
  const auto checkpoint = directory / "checkpoint.pt";
  prepare_results_dir(directory);

  Trainer trainer(config, data, device, meter);
  RunState state;
  std::error_code error;
  if (!config.fresh && std::filesystem::exists(checkpoint, error)) {
    state = load_checkpoint(checkpoint, config, trainer);
    progress.clear();
    std::printf(
        "going on from %s at iteration %lld\n",
        checkpoint.string().c_str(),
        static_cast<long long>(state.iteration));
  }

  while (state.iteration < config.iterations && interrupted() == 0) {
    const StepResult step = trainer.step(state.iteration);
    if (!std::isfinite(step.loss)) {
      progress.clear();
      detail::stop_on_bad_loss(
          "loss", step.loss, config, state.iteration + 1, checkpoint);
    }
    state.add(step);
    const bool last =
        state.iteration == config.iterations || interrupted() != 0;

    if (detail::is_due(state.iteration, config.log_every) ||
        state.iteration == config.iterations) {
      progress.clear();
      print_row(config, state);
    }
    if (last || detail::is_due(state.iteration, config.checkpoint_every)) {
      if (!trainer.weights_are_finite()) {
        progress.clear();
        detail::stop_on_bad_loss(
            "weights", NAN, config, state.iteration, checkpoint);
      }
      save_checkpoint(checkpoint, config, state, trainer);
    }
    if (!last && detail::is_due(state.iteration, config.evaluate_every)) {
      const Evaluation evaluation = detail::evaluate(trainer, progress);
      progress.clear();
      if (interrupted() == 0) {
        print_evaluation(state.iteration, evaluation);
      }
    }
    progress.show(format(
        "iteration %lld of %lld, loss %.4f, %s left",
        static_cast<long long>(state.iteration),
        static_cast<long long>(config.iterations),
        step.loss,
        remaining_time(
            step.milliseconds *
            static_cast<double>(config.iterations - state.iteration))
            .c_str()));
  }

  Evaluation evaluation;
  if (interrupted() == 0) {
    evaluation = detail::evaluate(trainer, progress);
  }
  nlohmann::ordered_json comparison;
  if (interrupted() == 0) {
    progress.clear();
    print_evaluation(state.iteration, evaluation);
    print_summary(config, state, trainer, evaluation);
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
        static_cast<long long>(state.iteration));
    return 128 + interrupted();
  }
  const auto results = directory / "results.json";
  write_results(results, config, state, trainer, evaluation, comparison);
  std::printf("\nresults: %s\n", results.string().c_str());
  return 0;
}

} // namespace training
