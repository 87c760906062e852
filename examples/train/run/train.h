// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/allocation_meter.h>
#include <memcnn/plain_autograd.h>

#include "support/error.h"
#include "train/base/config.h"
#include "train/base/files.h"
#include "train/base/folder.h"
#include "train/base/new_file.h"
#include "train/data/data_set.h"
#include "train/libtorch/algorithms.h"
#include "train/run/banner.h"
#include "train/run/begin.h"
#include "train/run/checkpoint_files.h"
#include "train/run/classes.h"
#include "train/run/comparison.h"
#include "train/run/interrupt.h"
#include "train/run/log.h"
#include "train/run/out_of_memory.h"
#include "train/run/own_files.h"
#include "train/run/print.h"
#include "train/run/progress_line.h"
#include "train/run/results.h"
#include "train/run/results_dir.h"
#include "train/run/run.h"
#include "train/step/trainer.h"
#include "train/weights/python_weights.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/cuda.h>
#include <torch/utils.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <system_error>
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

inline void keep_first(Images& images, int64_t count) {
  if (count > 0 && count < images.size()) {
    images.pixels = images.pixels.narrow(0, 0, count);
    images.labels = images.labels.narrow(0, 0, count);
  }
}

/// Compares and prints it. Nothing where a signal asks to stop, or where that
/// fails, such as for want of memory, of which the plain twin takes more than
/// all before: the run can do without.
inline std::optional<Comparison> try_to_compare(
    const Config& config,
    const DataSet& data,
    torch::Device device,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  std::string reason;
  try {
    auto comparison = compare_with_plain(config, data, device, meter, progress);
    if (comparison) {
      print_comparison(config, *comparison);
    }
    return comparison;
  } catch (const c10::Error& error) {
    reason = reason_of(error);
  } catch (const support::Error& error) {
    reason = error.what();
  }
  progress.clear();
  print_warning("the comparison is left out: " + reason);
  return std::nullopt;
}

/// What comes after the last step: evaluation, comparison, results, weights.
/// False where a signal asks to stop before the results are complete; nothing
/// is written then.
inline bool finish(
    const Config& config,
    const DataSet& data,
    const Folder& folder,
    Run& run,
    Trainer& trainer,
    memcnn::AllocationMeter& meter,
    ProgressLine& progress) {
  const std::optional<Evaluation> evaluation = run.evaluate();
  if (!evaluation) {
    return false;
  }
  print_evaluation(run.state().iteration, *evaluation);
  print_summary(config, run.state(), trainer, *evaluation);
  print_classes(*evaluation, data.class_names);
  auto results = make_results(config, data, run.state(), trainer, *evaluation);
  if (config.compare_plain > 0) {
    const auto comparison =
        try_to_compare(config, data, trainer.device(), meter, progress);
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

/// How a run that was stopped goes on: with these flags it would not do so from
/// its last checkpoint.
inline std::string how_to_go_on(const Config& config) {
  return fmt::format(
      "the same command without {} goes on from there",
      config.from_previous ? "--from-previous" : "--fresh");
}

/// What a run says that could not print all of it; stderr may still be read.
inline void
print_lost_output(const Config& config, const RunState& state, bool finished) {
  std::fputs(
      fmt::format(
          "memcnn_train: expected stdout to be writable, but writing it failed: "
          "{}. {}\n",
          std::generic_category().message(output_error()),
          finished ? "The run is done, and all its files are written."
                   : fmt::format(
                         "The run stopped at iteration {}; {}.",
                         state.iteration,
                         how_to_go_on(config)))
          .c_str(),
      stderr);
}

inline int train(const Config& config) {
  if (!config.save_weights.empty()) {
    check_save_weights(config);
  }
  const memcnn::PlainAutogradGuard plain(is_plain(config));
  const torch::Device device = start_device(config);
  if (config.threads > 0) {
    torch::set_num_threads(config.threads);
  }
  // From here on, so that every tensor of the program is known to the meter.
  memcnn::AllocationMeter meter(device.type());
  ProgressLine progress;

  progress.show("reading " + config.dataset);
  DataSet data = load_dataset(config);
  if (!data.class_names_flaw.empty()) {
    progress.clear();
    print_warning(data.class_names_flaw);
  }
  const uint32_t images = fingerprint(data);
  keep_first(data.test, config.test_images);
  ResultsDir directory(config.results_dir);
  const Folder& folder = directory.folder();
  const CheckpointFiles checkpoints(folder);
  for (const char* name : {kRunName, kLogName, kResultsName}) {
    folder.check_place(name);
  }
  if (!config.save_weights.empty()) {
    check_writable(config.save_weights, "--save-weights");
  }
  Trainer trainer(config, data, device, meter);
  progress.clear();

  RunState state = begin(config, images, checkpoints, folder, trainer);
  directory.keep();
  // What is there of another run, or of an earlier end of this one.
  folder.remove(kResultsName);
  write_run(folder, config, state, data, images, trainer);
  print_banner(config, data, state, trainer);
  Log log(folder, state.log);

  Run run(
      config, images, std::move(state), trainer, checkpoints, log, progress);
  run.train();
  const bool finished =
      finish(config, data, folder, run, trainer, meter, progress);
  if (output_error() != 0) {
    print_lost_output(config, run.state(), finished);
    return 128 + interrupted();
  }
  if (!finished) {
    say("stopped at iteration {}; {}",
        run.state().iteration,
        how_to_go_on(config));
    return 128 + interrupted();
  }
  return 0;
}

} // namespace detail

/// Trains, evaluates and reports as the configuration says. Returns the exit
/// code: 0, or 128 + the signal that stopped the run; that is SIGPIPE where
/// something could not be printed.
///
/// Throws:   Error for all that the user can put right.
inline int train(const Config& config) {
  try {
    return detail::train(config);
  } catch (const c10::OutOfMemoryError& error) {
    throw out_of_memory(config, error);
  }
}

} // namespace training
