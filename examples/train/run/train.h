// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "support/error.h"
#include "train/base/config.h"
#include "train/base/files.h"
#include "train/base/folder.h"
#include "train/base/interrupt.h"
#include "train/base/new_file.h"
#include "train/data/data_set.h"
#include "train/libtorch/algorithms.h"
#include "train/run/agreement.h"
#include "train/run/banner.h"
#include "train/run/begin.h"
#include "train/run/classes.h"
#include "train/run/comparison.h"
#include "train/run/end.h"
#include "train/run/file_names.h"
#include "train/run/out_of_memory.h"
#include "train/run/own_files.h"
#include "train/run/print.h"
#include "train/run/progress_line.h"
#include "train/run/results.h"
#include "train/run/run.h"
#include "train/run/run_files.h"
#include "train/run/run_state.h"
#include "train/run/say.h"
#include "train/step/step_result.h"
#include "train/step/trainer.h"
#include "train/team/launcher.h"
#include "train/team/team.h"
#include "train/weights/python_weights.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace training {

namespace detail {

/// Where a run computes; its algorithms are chosen.
inline torch::Device start_device(const Config& config) {
  const bool has_gpu = config.use_cuda && torch::cuda::is_available();
  if (config.cuda_graph == true && !has_gpu) {
    throw support::Error(
        "expected a GPU for --cuda-graph, but LibTorch finds none. Give no "
        "--cuda-graph to train on the CPU.");
  }
  if (has_gpu) {
    choose_algorithms(config.deterministic);
  }
  return has_gpu ? torch::kCUDA : torch::kCPU;
}

/// As many threads as there are cores for each process: LibTorch's default is
/// right for one, and torchrun's of 1 for machines whose cores it does not know.
inline void start_threads(const Config& config) {
  if (config.threads > 0) {
    torch::set_num_threads(config.threads);
  } else if (config.distributed) {
    const auto cores =
        static_cast<int64_t>(std::thread::hardware_concurrency());
    torch::set_num_threads(static_cast<int>(
        std::max<int64_t>(1, cores / processes_of_this_machine())));
  }
}

/// What the leader does after the last step and the evaluation: comparison,
/// results, weights. False where a signal asks to stop before the results are
/// complete; nothing is written then.
inline bool write_results(
    const Config& config,
    const DataSet& data,
    const Folder& folder,
    const RunState& state,
    const Evaluation& evaluation,
    Trainer& trainer,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  print_evaluation(state.iteration, evaluation);
  print_summary(config, state, trainer, evaluation);
  print_classes(evaluation, data.class_names);
  auto results = make_results(config, data, state, trainer, evaluation);
  if (config.compare_plain > 0) {
    const auto comparison = try_to_compare<Trainer>(
        config.model, config, data, trainer.device(), meter, progress);
    if (comparison) {
      results["comparison"] = comparison_figures(config, *comparison);
    } else if (interrupted() != 0) {
      return false;
    }
  }
  replace_file(folder, kResultsName, results.dump(2) + "\n");
  say("\nresults: {}", (folder.path() / kResultsName).string());
  if (!config.save_weights.empty()) {
    save_python_weights(config.save_weights, trainer.network());
    say("weights: {}", config.save_weights);
  }
  return true;
}

/// The images of a run, which every process reads for itself.
inline DataSet
read_data(const Config& config, const Team& team, ProgressLine& progress) {
  progress.show("reading " + config.dataset);
  DataSet data = load_dataset(config);
  if (team.leads() && !data.class_names_flaw.empty()) {
    progress.clear();
    print_warning(data.class_names_flaw);
  }
  return data;
}

/// Where the run begins, for all processes; what it is, for people to read.
inline RunState start(
    const Config& config,
    uint32_t images,
    const DataSet& data,
    RunFiles* files,
    Trainer& trainer) {
  if (files == nullptr) {
    return begin_with_leader(config, images, trainer);
  }
  const auto load_weights = [&] {
    if (!config.load_weights.empty()) {
      load_python_weights(config.load_weights, config.model, trainer.network());
    }
  };
  RunState state = begin_as_leader(
      config,
      images,
      begin(
          config,
          images,
          files->checkpoints(),
          files->folder(),
          trainer,
          load_weights),
      trainer);
  if (state.iteration > 0 && !config.load_weights.empty()) {
    say("not reading {}: the run started from it", config.load_weights);
  }
  files->keep(state.log);
  write_run(files->folder(), config, state, data, images, trainer);
  print_banner(config, data, state, trainer);
  return state;
}

inline int train(const Config& config, Team& team) {
  agree_on_options(config, team);
  check_batch_size(config, team);
  if (team.leads() && !config.save_weights.empty()) {
    check_save_weights(config);
  }
  const memcnn::PlainAutogradGuard plain(is_plain(config));
  const torch::Device device = start_device(config);
  start_threads(config);
  // From here on, so that every tensor of the program is known to the meter.
  memcnn::AllocationMeter meter(device.type());
  ProgressLine progress(team.leads());

  DataSet data = read_data(config, team, progress);
  const uint32_t images = fingerprint(data);
  agree_on_images(config, images, team);
  keep_first(data.test, config.test_images);
  std::optional<RunFiles> own_files;
  if (team.leads()) {
    own_files.emplace(config);
    if (!config.save_weights.empty()) {
      check_writable(config.save_weights, "--save-weights");
    }
  }
  RunFiles* files = own_files ? &*own_files : nullptr;
  Trainer trainer(config, data, device, meter, /*steps_on=*/std::nullopt, team);
  progress.clear();

  RunState state = start(config, images, data, files, trainer);
  Run run(config, images, std::move(state), trainer, files, progress);
  run.train();
  const std::optional<Evaluation> evaluation = run.evaluate();
  int code = 0;
  if (files != nullptr) {
    const bool finished = evaluation &&
        write_results(config,
                      data,
                      files->folder(),
                      run.state(),
                      *evaluation,
                      trainer,
                      meter,
                      progress);
    code = end(config, run.state(), team.stop_signal(), finished);
  }
  // Nobody leaves before the leader has written all.
  return std::stoi(team.from_leader(std::to_string(code)));
}

} // namespace detail

/// Trains, evaluates and reports as the configuration says, as one of a team.
/// Returns the exit code: 0, or 128 + the signal that stopped the run; that is
/// SIGPIPE where something could not be printed.
///
/// Throws:   Error for all that the user can put right.
inline int train(const Config& config, Team& team) {
  try {
    return detail::train(config, team);
  } catch (const c10::OutOfMemoryError& error) {
    throw out_of_memory(config, error);
  }
}

} // namespace training
