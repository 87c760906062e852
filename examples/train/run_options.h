// SPDX-License-Identifier: MIT
#pragma once

#include "support/command_line.h"
#include "train/base/run_settings.h"

#include <CLI/CLI.hpp>

#include <cstdint>
#include <string>

// The options that every program of training runs has, by their groups.

namespace training {

inline constexpr double kLargestRate = 1e30; // no float32 outlives more

inline void
add_length(CLI::App& app, RunSettings& settings, int64_t least_batch) {
  constexpr int64_t kMostImages = 50000; // for training, in any data set
  app.add_option(
         "--iterations",
         settings.iterations,
         "Training steps in all; 0: evaluate only")
      ->transform(support::count_from(0));
  app.add_option("--batch-size", settings.batch_size, "Images per step")
      ->transform(support::whole_number(least_batch, kMostImages));
}

inline void add_seed(CLI::App& app, RunSettings& settings) {
  app.add_option(
         "--seed",
         settings.seed,
         "Seed of weights, image order and augmentation")
      ->transform(support::seed());
}

inline void add_amp(CLI::App& app, RunSettings& settings) {
  app.add_flag(
      "--amp",
      settings.amp,
      "Compute in bfloat16 where that is accurate enough (automatic mixed "
      "precision)");
}

inline CLI::Option* add_no_cuda(CLI::App& app, RunSettings& settings) {
  return app.add_flag_callback(
      "--no-cuda",
      [&settings] { settings.use_cuda = false; },
      "Stay on the CPU where a GPU is present");
}

inline void add_compare_plain(CLI::App& app, RunSettings& settings) {
  app.add_option(
         "--compare-plain",
         settings.compare_plain,
         "At the end, train the network and its plain twin for this many steps "
         "each and print their memory and time side by side")
      ->transform(support::count_from(0));
}

/// `results` says what a results directory holds, and which is the default.
inline void
add_folders(CLI::App& app, RunSettings& settings, const std::string& results) {
  app.add_option(
         "--data-dir",
         settings.data_dir,
         "Folder of the data set's files (default: where the build targets "
         "download_cifar10 and download_cifar100 put them)")
      ->check(support::file_name());
  app.add_option("--results-dir", settings.results_dir, "Folder for " + results)
      ->check(support::file_name());
}

inline void add_checkpoints(CLI::App& app, RunSettings& settings) {
  app.add_option(
         "--checkpoint-every",
         settings.checkpoint_every,
         "Steps between two checkpoints; 0: at the end only")
      ->transform(support::count_from(0));
  CLI::Option* fresh = app.add_flag(
      "--fresh", settings.fresh, "Start anew, over an old checkpoint");
  app.add_flag(
         "--from-previous",
         settings.from_previous,
         "Go on from the checkpoint before the last one, where that is damaged")
      ->excludes(fresh);
}

inline void add_reports(CLI::App& app, RunSettings& settings) {
  app.option_defaults()->group("What is reported");
  app.add_option("--log-every", settings.log_every, "Steps between two rows")
      ->transform(support::count_from(1));
  app.add_option(
         "--evaluate-every",
         settings.evaluate_every,
         "Steps between two evaluations on the test images; 0: at the end only")
      ->transform(support::count_from(0));
  app.add_option(
         "--test-images",
         settings.test_images,
         "Evaluate on the first of the test images only; 0: on all")
      ->transform(support::count_from(0));
}

} // namespace training
