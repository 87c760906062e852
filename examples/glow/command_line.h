// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/model.h"
#include "support/command_line.h"
#include "train/data/data_set.h"
#include "train/run_options.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <cstdint>
#include <optional>
#include <string>

namespace glow {

namespace detail {

inline void add_model(CLI::App& app, Config& config) {
  constexpr int64_t kMostLevels = 5; // of images of 32 x 32
  constexpr int64_t kMostSteps = 10000;
  constexpr int64_t kMostChannels = 65536;
  app.option_defaults()->group("The flow");
  app.add_option(
         "--levels", config.levels, "Resolutions; each is half the one before")
      ->transform(support::whole_number(1, kMostLevels));
  app.add_option(
         "--steps",
         config.steps,
         "Steps in each level, of ActNorm, 1x1 convolution and coupling")
      ->transform(support::whole_number(1, kMostSteps));
  app.add_option(
         "--width", config.width, "Channels inside of the couplings' branches")
      ->transform(support::whole_number(1, kMostChannels));
  app.add_option(
         "--parametrization",
         config.parametrization,
         "How 1x1 convolutions keep their matrix: orthogonal ones lose no "
         "digits, plain ones can become singular")
      ->check(support::one_of(parametrization_names()));
  app.add_option(
         "--learn-bits",
         config.learn_bits,
         "Bits to learn of each byte of the images: 8, or 5, the coarser ones")
      ->transform(support::whole_number(1, 8));
}

inline void add_recipe(CLI::App& app, Config& config) {
  app.option_defaults()->group("The recipe");
  training::add_length(app, config, /*least_batch=*/1);
  app.add_option(
         "--learning-rate",
         config.learning_rate,
         "Learning rate of Adam, after the warm-up")
      ->check(support::number_up_to(training::kLargestRate));
  app.add_option(
         "--warm-up",
         config.warm_up,
         "Steps in which the learning rate rises to that; 0: none")
      ->transform(support::count_from(0));
  app.add_option(
         "--clip-norm",
         config.clip_norm,
         "Scales gradients down where their common norm is larger")
      ->check(support::number_up_to(training::kLargestRate));
  training::add_seed(app, config);
}

inline void add_computation(CLI::App& app, Config& config, bool& plain) {
  app.option_defaults()->group("How a step is computed");
  app.add_option(
         "--anchor-every",
         config.anchor_every,
         "Steps of a level from one kept stream to the next, from which backward "
         "goes on: fewer drift less and take more memory; 0: none")
      ->transform(support::count_from(0));
  CLI::Option* plain_option = app.add_flag(
      "--plain",
      plain,
      "Train the same flow with plain autograd, to compare with");
  training::add_compare_plain(app, config);
  plain_option->excludes(app.get_option("--compare-plain"));
  training::add_amp(app, config);
  app.add_option(
         "--threads", config.threads, "Threads on the CPU; 0: one per core")
      ->transform(support::threads_from(0));
  training::add_no_cuda(app, config);
}

inline void add_files(CLI::App& app, Config& config) {
  app.option_defaults()->group("Files");
  training::add_folders(
      app,
      config,
      "run.json, log.jsonl, samples-*.png, results.json and "
      "checkpoint.memcnn (default: results/glow-DATASET)");
  training::add_checkpoints(app, config);
}

inline void add_samples(CLI::App& app, Config& config) {
  constexpr double kHottest = 10;
  app.add_option(
         "--sample-every",
         config.sample_every,
         "Steps between two sheets of samples; 0: at the end only")
      ->transform(support::count_from(0));
  app.add_option(
         "--temperature",
         config.temperature,
         "Scale of the samples' latents: below 1 for fewer odd ones")
      ->check(support::number_up_to(kHottest));
}

} // namespace detail

/// Reads the command line. Nothing is returned where --help or --version was
/// all that was asked for.
///
/// Throws:   Error if an argument is missing, unknown or out of range.
inline std::optional<Config> parse_command_line(int argc, const char** argv) {
  Config config;
  bool plain = false;
  CLI::App app(
      "Trains a Glow, a normalizing flow, on small images, draws samples of it, "
      "and says what\nthat takes in memory. Goes on from the last checkpoint of "
      "the same run, if there is one.\nCtrl-C finishes the step, writes a "
      "checkpoint and stops.",
      "memcnn_glow");
  support::add_common_options(app);
  app.add_option("DATASET", config.dataset)
      ->required()
      ->check(support::one_of(training::dataset_names()));
  detail::add_model(app, config);
  detail::add_recipe(app, config);
  detail::add_computation(app, config, plain);
  detail::add_files(app, config);
  training::add_reports(app, config);
  detail::add_samples(app, config);
  if (!support::parse(app, argc, argv)) {
    return std::nullopt;
  }
  if (plain) {
    config = plain_twin(config);
  }
  if (config.results_dir.empty()) {
    config.results_dir =
        fmt::format("results/glow-{}{}", config.dataset, plain ? "-plain" : "");
  }
  return config;
}

} // namespace glow
