// SPDX-License-Identifier: MIT
#pragma once

#include "glow/config.h"
#include "glow/contact_sheet.h"
#include "glow/trainer.h"
#include "support/version.h"
#include "train/base/checksum.h"
#include "train/base/folder.h"
#include "train/base/new_file.h"
#include "train/data/images.h"
#include "train/run/file_names.h"
#include "train/run/run_state.h"
#include "train/run/step_figures.h"

#include <fmt/format.h>
#include <torch/utils.h>
#include <torch/version.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

// What other programs read: run.json, rows of the log, sheets, results.json.

namespace glow {

inline nlohmann::ordered_json to_json(const Evaluation& evaluation) {
  return {
      {"test_bits_per_dim", evaluation.bits_per_dim},
      {"reconstruction_error", evaluation.round_trip.error},
      {"drift", evaluation.round_trip.drift}};
}

/// The row of the steps since the last one, as the log has it.
inline nlohmann::ordered_json make_row(
    const Config& config,
    const training::RunState& state) {
  const training::StepSums& since = state.since_row;
  const auto steps = static_cast<double>(since.steps);
  return {
      {"iteration", state.iteration},
      {"loss", since.loss / steps},
      {"lr", learning_rate_at(config, state.iteration - 1)},
      {"ms_per_step", since.milliseconds / steps},
      {"data_ms_per_step", since.data_milliseconds / steps},
      {"held_bytes", training::measured(since.memory.held_after_forward)},
      {"peak_bytes", training::measured(since.memory.peak)}};
}

namespace detail {

inline nlohmann::ordered_json about(const Config& config, Trainer& trainer) {
  return {
      {"config", recipe(config)},
      {"temperature", config.temperature},
      {"device", trainer.device().str()},
      {"threads", torch::get_num_threads()},
      {"parameters", trainer.parameter_count()},
      {"parameter_bytes", trainer.parameter_bytes()},
      {"memcnn", support::version()},
      {"libtorch", TORCH_VERSION}};
}

} // namespace detail

/// Writes what is known of a run before it has done anything.
inline void write_run(
    const training::Folder& folder,
    const Config& config,
    const training::RunState& state,
    const training::DataSet& data,
    uint32_t fingerprint,
    Trainer& trainer) {
  auto run = detail::about(config, trainer);
  run["train_images"] = data.train.size();
  run["test_images"] = data.test.size();
  run["data_fingerprint"] = training::checksum_text(fingerprint);
  if (!state.earlier_iterations.empty()) {
    run["earlier_iterations"] = state.earlier_iterations;
  }
  training::replace_file(folder, training::kRunName, run.dump(2) + "\n");
}

/// Draws samples and writes a sheet of them. Returns its name.
inline std::string write_samples(
    const training::Folder& folder,
    int64_t iteration,
    Trainer& trainer) {
  constexpr int64_t kImages = 64;
  constexpr int64_t kColumns = 8;
  const auto name = fmt::format("samples-{:06}.png", iteration);
  training::replace_file(
      folder, name, png_of(contact_sheet(trainer.sample(kImages), kColumns)));
  return name;
}

/// What a run has come to.
inline nlohmann::ordered_json make_results(
    const Config& config,
    const training::RunState& state,
    Trainer& trainer,
    const Evaluation& evaluation) {
  auto results = detail::about(config, trainer);
  results.update(to_json(evaluation));
  results["step"] = training::step_figures(state);
  return results;
}

} // namespace glow
