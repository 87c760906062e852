// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/kept_activations.h>

#include "support/version.h"
#include "train/base/checksum.h"
#include "train/base/config.h"
#include "train/base/folder.h"
#include "train/base/new_file.h"
#include "train/data/images.h"
#include "train/libtorch/device_memory.h"
#include "train/run/classes.h"
#include "train/run/file_names.h"
#include "train/run/run_state.h"
#include "train/run/step_figures.h"
#include "train/step/step_result.h"
#include "train/step/trainer.h"

#include <torch/utils.h>
#include <torch/version.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

namespace training {

namespace detail {

/// What averages gradients; null in one process.
inline nlohmann::ordered_json backend_of(const Trainer& trainer) {
  const std::string backend = trainer.team().backend();
  return backend.empty() ? nullptr : nlohmann::ordered_json(backend);
}

} // namespace detail

/// The row of the steps since the last one, as the log has it.
inline nlohmann::ordered_json make_row(
    const Config& config,
    const RunState& state) {
  const StepSums& since = state.since_row;
  const auto steps = static_cast<double>(since.steps);
  const double images = steps * static_cast<double>(config.batch_size);
  return {
      {"iteration", state.iteration},
      {"loss", since.loss / steps},
      {"accuracy", static_cast<double>(since.hits.first) / images},
      {"top5", static_cast<double>(since.hits.top5) / images},
      {"lr", learning_rate_at(config, state.iteration - 1)},
      {"ms_per_step", since.milliseconds / steps},
      {"data_ms_per_step", since.data_milliseconds / steps},
      {"held_bytes", measured(since.memory.held_after_forward)},
      {"peak_bytes", measured(since.memory.peak)}};
}

/// Writes what is known of a run before it has done anything.
inline void write_run(
    const Folder& folder,
    const Config& config,
    const RunState& state,
    const DataSet& data,
    uint32_t fingerprint,
    const Trainer& trainer) {
  nlohmann::ordered_json run = {
      {"config", recipe(config)},
      {"device", trainer.device().str()},
      {"cuda_graph", uses_graph(config, trainer.device())},
      {"deterministic", config.deterministic},
      {"threads", torch::get_num_threads()},
      {"processes", trainer.team().size()},
      {"backend", detail::backend_of(trainer)},
      {"parameters", trainer.parameter_count()},
      {"parameter_bytes", trainer.parameter_bytes()},
      {"classes", data.num_classes},
      {"train_images", data.train.size()},
      {"test_images", data.test.size()},
      {"data_fingerprint", checksum_text(fingerprint)},
      {"memcnn", support::version()},
      {"libtorch", TORCH_VERSION}};
  if (!state.earlier_iterations.empty()) {
    run["earlier_iterations"] = state.earlier_iterations;
  }
  replace_file(folder, kRunName, run.dump(2) + "\n");
}

namespace detail {

inline nlohmann::ordered_json kept_figures(
    const memcnn::KeptActivations& kept) {
  return {
      {"bytes", kept.bytes},
      {"blocks", kept.blocks},
      {"results", kept.results},
      {"multiply_adds", kept.multiply_adds},
      {"spared", kept.spared}};
}

} // namespace detail

/// What a run has come to. The memory of its GPU is that of now.
inline nlohmann::ordered_json make_results(
    const Config& config,
    const DataSet& data,
    const RunState& state,
    const Trainer& trainer,
    const Evaluation& evaluation) {
  nlohmann::ordered_json results = {
      {"config", recipe(config)},
      {"device", trainer.device().str()},
      {"cuda_graph", uses_graph(config, trainer.device())},
      {"deterministic", config.deterministic},
      {"processes", trainer.team().size()},
      {"backend", detail::backend_of(trainer)},
      {"parameters", trainer.parameter_count()},
      {"parameter_bytes", trainer.parameter_bytes()},
      {"test_accuracy", evaluation.accuracy},
      {"test_top5", evaluation.top5},
      {"test_loss", evaluation.loss},
      {"step", step_figures(state)}};
  const memcnn::KeptActivations kept = kept_by(trainer.network());
  if (kept.multiply_adds > 0) { // there is a budget, and a step was taken
    results["kept"] = detail::kept_figures(kept);
  }
  if (trainer.device().is_cuda()) {
    results["gpu_bytes"] = taken_bytes(trainer.device());
  }
  auto& by_class = results["class_accuracy"];
  for (const auto& found : accuracy_by_class(evaluation, data.class_names)) {
    by_class[found.name] = found.accuracy;
  }
  return results;
}

} // namespace training
