// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/printable.h"
#include "train/base/checksum.h"
#include "train/base/files.h"
#include "train/base/run_settings.h"
#include "train/run/as_argument.h"
#include "train/run/checkpoint_content.h"
#include "train/run/run_state.h"
#include "train/run/trainer_state.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>

namespace training {

namespace detail {

[[noreturn]] inline void stop_on_seed(
    const std::filesystem::path& path,
    const std::string& found,
    const RunSettings& config) {
  throw support::Error(fmt::format(
      "expected the checkpoint {} to have seed {}, but got {}: its weights and "
      "the order of its images followed from that, and with another seed it is "
      "another run. Give --seed {} to go on, --fresh to overwrite it, or another "
      "--results-dir.",
      path.string(),
      config.seed,
      found,
      found));
}

/// Whether a setting of two recipes is the same. A file has many paths.
inline bool is_same_setting(
    const std::string& key,
    const nlohmann::json& one,
    const nlohmann::json& other) {
  return one == other ||
      (key == "load_weights" && one.is_string() && other.is_string() &&
       is_same_file(one.get<std::string>(), other.get<std::string>()));
}

/// Refuses a checkpoint that another recipe made; its length may be another.
template <class Config>
void check_recipe(
    const std::filesystem::path& path,
    const nlohmann::json& found,
    const Config& config) {
  const auto expected = recipe(config);
  for (const auto& [key, value] : expected.items()) {
    const nlohmann::json got =
        found.contains(key) ? found.at(key) : nlohmann::json();
    if (key == "iterations" || is_same_setting(key, value, got)) {
      continue;
    }
    if (key == "seed") {
      stop_on_seed(path, support::printable(got.dump()), config);
    }
    throw support::Error(fmt::format(
        "expected the checkpoint {} to be of a run with {}, but it is of one "
        "with {}. Give --fresh to overwrite it, or another --results-dir.",
        path.string(),
        as_argument(key, value),
        as_argument(key, got)));
  }
}

/// What is done cannot be taken back.
inline void check_length(
    const std::filesystem::path& path,
    const RunState& state,
    const RunSettings& config) {
  if (config.iterations < state.iteration) {
    throw support::Error(fmt::format(
        "expected --iterations to be at least the {} that the checkpoint "
        "{} has done, but got {}. Give --iterations {} to evaluate it as it is, "
        "--fresh to overwrite it with a shorter run, or another --results-dir.",
        state.iteration,
        path.string(),
        config.iterations,
        state.iteration));
  }
}

inline void check_images(
    const std::filesystem::path& path,
    uint32_t expected,
    uint32_t found,
    const RunSettings& config) {
  if (found != expected) {
    throw support::Error(fmt::format(
        "expected the images of {} to be those that the checkpoint {} was "
        "trained on (checksum {}), but got others ({}): a data file has "
        "changed. Restore it, or give --fresh to start anew.",
        config.dataset,
        path.string(),
        checksum_text(expected),
        checksum_text(found)));
  }
}

} // namespace detail

/// All that a run needs to go on as if it had never stopped. `fingerprint` is
/// that of its images. The configuration of a program is RunSettings and more,
/// for which there is recipe().
template <class Config, class Trainer>
std::string make_checkpoint(
    const Config& config,
    uint32_t fingerprint,
    const RunState& state,
    Trainer& trainer) {
  return checkpoint_bytes(
      {recipe(config), fingerprint, state, trainer_state(trainer)});
}

/// Goes on from what make_checkpoint() made, and `path` has: fills the trainer
/// and returns the state.
///
/// Throws:   Error if it is of another recipe, of other images, or of a longer
///           run, FormatError if it is damaged; the trainer is then not to be
///           used.
template <class Config, class Trainer>
RunState restore_checkpoint(
    const std::string& bytes,
    const std::filesystem::path& path,
    const Config& config,
    uint32_t fingerprint,
    Trainer& trainer) {
  const Checkpoint checkpoint = parse_checkpoint(bytes);
  detail::check_recipe(path, checkpoint.recipe, config);
  detail::check_length(path, checkpoint.state, config);
  detail::check_images(path, checkpoint.images, fingerprint, config);
  restore_trainer(checkpoint.tensors, trainer);
  return checkpoint.state;
}

} // namespace training
