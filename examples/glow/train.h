// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "glow/config.h"
#include "glow/print.h"
#include "glow/results.h"
#include "glow/run.h"
#include "glow/trainer.h"
#include "train/base/interrupt.h"
#include "train/base/new_file.h"
#include "train/data/data_set.h"
#include "train/libtorch/algorithms.h"
#include "train/run/begin.h"
#include "train/run/comparison.h"
#include "train/run/end.h"
#include "train/run/out_of_memory.h"
#include "train/run/progress_line.h"
#include "train/run/run_files.h"

#include <c10/util/Exception.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace glow {

namespace detail {

/// Where a run computes; its algorithms are chosen.
inline torch::Device start_device(const Config& config) {
  if (config.threads > 0) {
    torch::set_num_threads(config.threads);
  }
  if (!config.use_cuda || !torch::cuda::is_available()) {
    return torch::kCPU;
  }
  training::choose_algorithms(/*deterministic=*/false);
  return torch::kCUDA;
}

/// Where the run begins; what it is, for people to read.
inline training::RunState start(
    const Config& config,
    uint32_t fingerprint,
    const training::DataSet& data,
    training::RunFiles& files,
    Trainer& trainer) {
  training::RunState state = training::begin(
      config, fingerprint, files.checkpoints(), files.folder(), trainer);
  files.keep(state.log);
  write_run(files.folder(), config, state, data, fingerprint, trainer);
  print_banner(config, data, state, trainer);
  return state;
}

/// What comes after the last step and the evaluation. False where a signal asks
/// to stop before the results are complete; nothing is written then.
inline bool write_results(
    const Config& config,
    const training::DataSet& data,
    const training::Folder& folder,
    const training::RunState& state,
    const Evaluation& evaluation,
    Trainer& trainer,
    memcnn::AllocationMeter& meter,
    training::ProgressLine& progress) {
  print_evaluation(state.iteration, evaluation);
  auto results = make_results(config, state, trainer, evaluation);
  results["samples"] = write_samples(folder, state.iteration, trainer);
  print_samples(config, results["samples"]);
  print_summary(config, state, trainer, evaluation);
  if (config.compare_plain > 0) {
    const auto comparison = training::try_to_compare<Trainer>(
        "glow", config, data, trainer.device(), meter, progress);
    if (comparison) {
      results["comparison"] = training::comparison_figures(config, *comparison);
    } else if (training::interrupted() != 0) {
      return false;
    }
  }
  training::replace_file(
      folder, training::kResultsName, results.dump(2) + "\n");
  training::say(
      "\nresults: {}", (folder.path() / training::kResultsName).string());
  return true;
}

inline int train(const Config& config) {
  const memcnn::PlainAutogradGuard plain(is_plain(config));
  const torch::Device device = start_device(config);
  // From here on, so that every tensor of the program is known to the meter.
  memcnn::AllocationMeter meter(device.type());
  training::ProgressLine progress;

  progress.show("reading " + config.dataset);
  training::DataSet data = training::load_dataset(config);
  const uint32_t fingerprint = training::fingerprint(data);
  training::keep_first(data.test, config.test_images);
  training::RunFiles files(config);
  Trainer trainer(config, data, device, meter);
  progress.clear();

  Run run(
      config,
      fingerprint,
      start(config, fingerprint, data, files, trainer),
      trainer,
      files,
      progress);
  run.train();
  const std::optional<Evaluation> evaluation = run.evaluate();
  const bool finished = evaluation &&
      write_results(config,
                    data,
                    files.folder(),
                    run.state(),
                    *evaluation,
                    trainer,
                    meter,
                    progress);
  return training::end(config, run.state(), training::interrupted(), finished);
}

} // namespace detail

/// Trains, evaluates, draws samples and reports as the configuration says.
/// Returns the exit code: 0, or 128 + the signal that stopped the run; that is
/// SIGPIPE where something could not be printed.
///
/// Throws:   Error for all that the user can put right.
inline int train(const Config& config) {
  try {
    return detail::train(config);
  } catch (const c10::OutOfMemoryError& error) {
    throw training::out_of_memory(
        static_cast<const training::RunSettings&>(config), error);
  }
}

} // namespace glow
