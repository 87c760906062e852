// SPDX-License-Identifier: MIT
#pragma once

#include "support/command_line.h"
#include "support/error.h"
#include "train/base/config.h"
#include "train/data/data_set.h"
#include "train/run_options.h"
#include "train/step/network.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace training {

namespace detail {

using support::count_from;
using support::number_up_to;

/// Where a data set has its place, people have the order wrong.
inline CLI::Validator model_name() {
  const CLI::Validator known = support::one_of(model_names());
  return CLI::Validator(
      [known](std::string& text) -> std::string {
        const auto& others = dataset_names();
        return std::find(others.begin(), others.end(), text) == others.end()
            ? known(text)
            : text + " is a DATASET, which stands behind MODEL";
      },
      known.get_description());
}

/// What saves memory, or looks at what that does: not for a plain network.
inline std::vector<std::string> saving_options() {
  return {
      "--engine",
      "--memory-budget",
      "--keep-transitions",
      "--check-inverse",
      "--compare-plain"};
}

inline void add_recipe(CLI::App& app, Config& config) {
  app.option_defaults()->group("The recipe");
  add_length(app, config, /*least_batch=*/2); // of batch normalisation
  app.add_option(
         "--learning-rate",
         config.learning_rate,
         "Learning rate; a tenth of it from 1/2, a hundredth from 3/4 of the "
         "iterations on")
      ->check(number_up_to(kLargestRate));
  app.add_option("--weight-decay", config.weight_decay, "Weight decay")
      ->check(number_up_to(kLargestRate));
  add_seed(app, config);
  app.add_option(
         "--load-weights",
         config.load_weights,
         "Start from the weights in this file, a state dict written by "
         "torch.save() from Python MemCNN's network, or by --save-weights "
         "(default: random weights)")
      ->check(support::file_name());
}

inline void add_computation(CLI::App& app, Config& config) {
  app.option_defaults()->group("How a step is computed");
  app.add_option(
         "--engine",
         config.engine,
         "What saves the memory of a reversible network")
      ->check(support::one_of(engine_names()));
  app.add_option(
         "--memory-budget",
         config.memory_budget,
         "MiB that the sequence engine may keep of what it would compute again: "
         "results of convolutions first, then whole blocks. The run says what "
         "is kept")
      ->transform(count_from(0));
  app.add_flag_callback(
      "--keep-transitions",
      [&config] { config.checkpoint_transitions = false; },
      "Keep the activations of down-sampling blocks, which takes twice the "
      "memory and a little less time");
  constexpr int64_t kMostFractionalBits = 23; // of float32's 24
  app.add_option(
         "--fractional-bits",
         config.fractional_bits,
         "Compute reversible blocks in multiples of 2^-INT, so that they are "
         "undone exactly: every engine, and --plain, then prints the same "
         "losses. 12 to 16 suit float32 (default: no rounding)")
      ->transform(support::whole_number(0, kMostFractionalBits));
  add_amp(app, config);
  app.add_option(
         "--memory-format",
         config.memory_format,
         "How images and weights of convolutions lie in memory")
      ->check(support::one_of(memory_format_names()));
  app.add_option(
         "--threads",
         config.threads,
         "Threads on the CPU; 0: one per core, of which the processes of a "
         "machine have equally many")
      ->transform(support::threads_from(0));
}

inline void add_gpu(CLI::App& app, Config& config) {
  app.option_defaults()->group("On a GPU");
  CLI::Option* no_cuda = add_no_cuda(app, config);
  CLI::Option* no_graph = app.add_flag_callback(
      "--no-cuda-graph",
      [&config] { config.cuda_graph = false; },
      "Launch the kernels of a GPU one by one, instead of each step as one CUDA "
      "graph");
  app.add_flag_function(
         "--cuda-graph", // a file of options may say that it is false
         [&config](int64_t count) { config.cuda_graph = count > 0; },
         "Insist on that graph: without a GPU, stop (default: a graph where "
         "there is a GPU)")
      ->excludes(no_cuda)
      ->excludes(no_graph);
  app.add_flag(
      "--deterministic",
      config.deterministic,
      "On a GPU, choose algorithms that give the same bits in every run, "
      "instead of the fastest");
}

inline void add_comparisons(CLI::App& app, Config& config, bool& plain) {
  app.option_defaults()->group("Comparison with plain autograd");
  CLI::Option* plain_option = app.add_flag(
      "--plain",
      plain,
      "Train the same network with plain autograd, to compare with");
  app.add_option(
         "--check-inverse",
         config.check_inverse,
         "Steps between two checks of a batch, with a warning where it "
         "matters: how far off inputs are that blocks rebuild, and gradients "
         "from plain autograd's. Takes the time of three steps and less memory "
         "than a plain one; 0: never")
      ->transform(count_from(0));
  add_compare_plain(app, config);
  for (const std::string& option : saving_options()) {
    plain_option->excludes(app.get_option(option));
  }
}

inline void add_processes(CLI::App& app, Config& config) {
  app.option_defaults()->group("Several processes");
  CLI::Option* distributed = app.add_flag(
      "--distributed",
      config.distributed,
      "Train as one of the processes that torchrun --no-python has started: each "
      "takes its slice of every batch, and gradients are averaged. On GPUs, "
      "kernels are launched one by one");
  app.add_option(
         "--backend",
         config.backend,
         "What carries gradients: nccl wants a GPU for each process; automatic "
         "takes it where each has one, else gloo, which shares GPUs")
      ->check(support::one_of({"automatic", "gloo", "nccl"}))
      ->needs(distributed);
  app.add_option(
         "--peer-timeout",
         config.peer_timeout,
         "Seconds to wait for another process before giving up")
      ->transform(count_from(1))
      ->needs(distributed);
  // One compares within a process, the other is a graph without the host.
  for (const char* option : {"--compare-plain", "--cuda-graph"}) {
    distributed->excludes(app.get_option(option));
  }
}

inline void add_files(CLI::App& app, Config& config) {
  app.option_defaults()->group("Files");
  add_folders(
      app,
      config,
      "run.json, log.jsonl, results.json and checkpoint.memcnn (default: "
      "results/MODEL-DATASET)");
  app.add_option(
         "--save-weights",
         config.save_weights,
         "At the end, write the weights to this file, for Python's torch.load() "
         "and load_state_dict()")
      ->check(support::file_name());
  add_checkpoints(app, config);
}

/// What CLI11 cannot know: that some options depend on what others say.
inline void check_combination(const CLI::App& app, const Config& config) {
  if (config.memory_budget > 0 && config.engine != "sequence") {
    throw support::Error(fmt::format(
        "expected --engine to be sequence with --memory-budget, but got "
        "\"{}\".",
        config.engine));
  }
  if (is_reversible(config.model)) {
    return;
  }
  std::vector<std::string> reversible;
  const auto& names = model_names();
  std::copy_if(
      names.begin(),
      names.end(),
      std::back_inserter(reversible),
      is_reversible);
  auto needless = saving_options();
  needless.push_back("--fractional-bits");
  for (const std::string& option : needless) {
    if (app.count(option) > 0) {
      throw support::Error(fmt::format(
          "expected MODEL to be one of {} with {}, but got \"{}\", which is "
          "plain as it is.",
          fmt::join(reversible, ", "),
          option,
          config.model));
    }
  }
}

/// Beside those of other models, data sets and engines.
inline std::string default_results_dir(const Config& config) {
  const bool usual =
      !is_reversible(config.model) || config.engine == Config().engine;
  return fmt::format(
      "results/{}-{}{}",
      config.model,
      config.dataset,
      usual ? "" : "-" + config.engine);
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
      "Trains a residual network (resnet...) or a reversible one (revnet...) "
      "on small images,\nand says what that takes in memory. Goes on from the "
      "last checkpoint of the same run, if\nthere is one. Ctrl-C finishes the "
      "step, writes a checkpoint and stops.",
      "memcnn_train");
  support::add_common_options(app);
  app.add_option("MODEL", config.model)
      ->required()
      ->check(detail::model_name());
  app.add_option("DATASET", config.dataset)
      ->required()
      ->check(support::one_of(dataset_names()));
  detail::add_recipe(app, config);
  detail::add_computation(app, config);
  detail::add_gpu(app, config);
  detail::add_comparisons(app, config, plain);
  detail::add_processes(app, config);
  detail::add_files(app, config);
  add_reports(app, config);
  if (!support::parse(app, argc, argv)) {
    return std::nullopt;
  }
  detail::check_combination(app, config);
  if (plain || !is_reversible(config.model)) {
    config = plain_twin(config);
  }
  if (config.results_dir.empty()) {
    config.results_dir = detail::default_results_dir(config);
  }
  return config;
}

} // namespace training
