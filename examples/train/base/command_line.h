// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "support/version.h"
#include "train/base/config.h"
#include "train/data/data_set.h"
#include "train/step/network.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace training {

namespace detail {

inline std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

inline std::string known_flags(const CLI::App& app) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : app.get_options()) {
    for (const auto& name : option->get_lnames()) {
      flags.push_back("--" + name);
    }
  }
  return joined(flags);
}

/// Accepts numbers of a type in a range; `described` says it in words.
template <class T>
CLI::Validator between(T least, T most, const std::string& described) {
  return CLI::Validator(
      [=](const std::string& text) {
        std::istringstream stream(text);
        T value{};
        if (stream >> value && stream.peek() == EOF && value >= least &&
            value <= most) {
          return std::string();
        }
        return (std::is_integral_v<T> ? "a whole number " : "a number ") +
            described + ", but got \"" + text + "\"";
      },
      "");
}

/// Accepts numbers of a type from `least` on.
template <class T>
CLI::Validator at_least(T least) {
  std::ostringstream described;
  described << "of at least " << least;
  return between(least, std::numeric_limits<T>::max(), described.str());
}

inline void check_name(
    const char* what,
    const std::string& name,
    const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    throw support::Error(
        std::string("expected ") + what + " to be one of " + joined(known) +
        ", but got \"" + name + "\".");
  }
}

} // namespace detail

/// Reads the command line. Nothing is returned where --help or --version was
/// all that was asked for.
///
/// Throws:   Error if an argument is missing, unknown or out of range.
inline std::optional<Config> parse_command_line(int argc, const char** argv) {
  Config config;
  CLI::App app(
      "Trains a residual network (resnet...) or a reversible one (revnet...) "
      "on small images,\nand says what that takes in memory. Goes on from the "
      "last checkpoint of the same run, if\nthere is one. Ctrl-C finishes the "
      "step, writes a checkpoint and stops.",
      "memcnn_train");
  app.set_version_flag("--version", "memcnn_train " + support::version());
  app.option_defaults()->always_capture_default();

  app.add_option("MODEL", config.model, detail::joined(model_names()))
      ->required();
  app.add_option("DATASET", config.dataset, detail::joined(dataset_names()))
      ->required();

  app.add_option(
         "--iterations",
         config.iterations,
         "Training steps in all; 0: evaluate only")
      ->check(detail::at_least<int64_t>(0));
  app.add_option("--batch-size", config.batch_size, "Images per step")
      ->check(detail::at_least<int64_t>(2));
  app.add_option(
         "--learning-rate",
         config.learning_rate,
         "Learning rate; a tenth of it from 1/2, a hundredth from 3/4 of the "
         "iterations on")
      ->check(detail::at_least<double>(0));
  app.add_option("--weight-decay", config.weight_decay, "Weight decay")
      ->check(detail::at_least<double>(0));
  app.add_option(
         "--seed", config.seed, "Seed of weights, image order and augmentation")
      ->check(detail::at_least<int64_t>(0));
  bool keep_transitions = false;
  std::vector<CLI::Option*> savers{
      app.add_option(
          "--engine",
          config.engine,
          "What saves the memory of a reversible network: " +
              detail::joined(engine_names())),
      app.add_option(
             "--memory-budget",
             config.memory_budget,
             "MiB of activations that the sequence engine may keep in each of "
             "the three groups of blocks, to save their recomputation")
          ->check(detail::at_least<int64_t>(0)),
      app.add_flag(
          "--keep-transitions",
          keep_transitions,
          "Keep the activations of down-sampling blocks, which takes twice the "
          "memory and a little less time")};
  bool plain = false;
  app.add_flag(
      "--plain",
      plain,
      "Train the same network with plain autograd, to compare with");
  CLI::Option* fractional_bits =
      app.add_option(
             "--fractional-bits",
             config.fractional_bits,
             "Compute reversible blocks in multiples of 2^-INT, 12 to 16, so "
             "that they are undone exactly: every engine, and --plain, then "
             "prints the same losses (default: no rounding)")
          ->check(detail::between<int64_t>(0, 23, "from 0 to 23"));
  app.add_flag(
      "--amp",
      config.amp,
      "Compute in bfloat16 where that is accurate enough (automatic mixed "
      "precision)");
  app.add_option(
      "--memory-format",
      config.memory_format,
      "How images and weights of convolutions lie in memory: " +
          detail::joined(memory_format_names()));
  CLI::Option* check_inverse =
      app.add_option(
             "--check-inverse",
             config.check_inverse,
             "Steps between two checks of a batch, with a warning where it "
             "matters: how far off inputs are that blocks rebuild, and "
             "gradients from plain autograd's. Takes the time of three steps "
             "and less memory than a plain one; 0: never")
          ->check(detail::at_least<int64_t>(0));
  CLI::Option* compare_plain =
      app.add_option(
             "--compare-plain",
             config.compare_plain,
             "At the end, train the network and its plain twin for this many "
             "steps each and print their memory and time side by side")
          ->check(detail::at_least<int64_t>(0));

  app.add_flag("--fresh", config.fresh, "Start anew, over an old checkpoint");
  app.add_flag(
      "--from-previous",
      config.from_previous,
      "Go on from the checkpoint before the last one, where that is damaged");
  bool no_cuda = false;
  app.add_flag("--no-cuda", no_cuda, "Stay on the CPU where a GPU is present");
  app.add_option(
         "--threads", config.threads, "Threads on the CPU; 0: one per core")
      ->check(detail::at_least<int64_t>(0));
  app.add_option(
      "--data-dir",
      config.data_dir,
      "Folder of the data set's files (default: where the build targets "
      "download_cifar10 and download_cifar100 put them)");
  app.add_option(
      "--results-dir",
      config.results_dir,
      "Folder for run.json, log.jsonl, results.json and checkpoint.pt "
      "(default: "
      "results/MODEL-DATASET)");
  app.add_option(
      "--load-weights",
      config.load_weights,
      "Start from the weights in this file, a state dict written by "
      "torch.save() from Python MemCNN's network, or by --save-weights "
      "(default: random weights)");
  app.add_option(
      "--save-weights",
      config.save_weights,
      "At the end, write the weights to this file, for Python's torch.load() "
      "and load_state_dict()");
  app.add_option("--log-every", config.log_every, "Steps between two rows")
      ->check(detail::at_least<int64_t>(1));
  app.add_option(
         "--evaluate-every",
         config.evaluate_every,
         "Steps between two evaluations on the test images; 0: at the end only")
      ->check(detail::at_least<int64_t>(0));
  app.add_option(
         "--test-images",
         config.test_images,
         "Evaluate on the first of the test images only; 0: on all")
      ->check(detail::at_least<int64_t>(0));
  app.add_option(
         "--checkpoint-every",
         config.checkpoint_every,
         "Steps between two checkpoints; 0: at the end only")
      ->check(detail::at_least<int64_t>(0));

  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError&) {
    throw support::Error(
        "expected arguments out of MODEL, DATASET, " +
        detail::known_flags(app) + ", but got \"" + app.remaining().front() +
        "\".");
  } catch (const CLI::RequiredError&) {
    throw support::Error(
        "expected MODEL and DATASET, but one of them is missing. See "
        "memcnn_train --help.");
  } catch (const CLI::ValidationError& error) {
    std::string text = error.what(); // "--flag: a number ..., but got ..."
    const auto colon = text.find(": ");
    if (colon != std::string::npos) {
      text.replace(colon, 2, " to be ");
    }
    throw support::Error("expected " + text + ". See memcnn_train --help.");
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      app.exit(error);
      return std::nullopt;
    }
    throw support::Error(
        "expected a valid command line, but got: " + std::string(error.what()) +
        ". See memcnn_train --help.");
  }

  detail::check_name("MODEL", config.model, model_names());
  detail::check_name("DATASET", config.dataset, dataset_names());
  detail::check_name("--engine", config.engine, engine_names());
  detail::check_name(
      "--memory-format", config.memory_format, memory_format_names());
  config.use_cuda = !no_cuda;
  config.checkpoint_transitions = !keep_transitions;
  if (config.fresh && config.from_previous) {
    throw support::Error("expected --fresh or --from-previous, but got both.");
  }
  if (config.memory_budget > 0 && config.engine != "sequence") {
    throw support::Error(
        "expected --engine to be sequence with --memory-budget, but got \"" +
        config.engine + "\".");
  }
  savers.push_back(check_inverse);
  savers.push_back(compare_plain);
  for (const CLI::Option* option : savers) {
    if (plain && option->count() > 0) {
      throw support::Error(
          "expected --plain or " + option->get_name() + ", but got both.");
    }
  }
  if (!is_reversible(config.model)) {
    savers.push_back(fractional_bits);
    for (const CLI::Option* option : savers) {
      if (option->count() > 0) {
        throw support::Error(
            "expected MODEL to be one of " + detail::joined(revnet::names()) +
            " with " + option->get_name() + ", but got \"" + config.model +
            "\", which is plain as it is.");
      }
    }
    plain = true;
  }
  if (plain) {
    config = plain_twin(config);
  }
  if (config.results_dir.empty()) {
    config.results_dir = "results/" + config.model + "-" + config.dataset;
    if (is_reversible(config.model) && config.engine != Config().engine) {
      config.results_dir += "-" + config.engine;
    }
  }
  return config;
}

} // namespace training
