// SPDX-License-Identifier: MIT
#pragma once

#include "benchmark/budget.h"
#include "benchmark/config.h"
#include "benchmark/report.h"
#include "support/error.h"
#include "support/version.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace benchmark {

namespace detail {

inline std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

inline CLI::Validator from_to(int64_t least, int64_t most) {
  return CLI::Validator(
      [least, most](const std::string& text) -> std::string {
        std::istringstream stream(text);
        int64_t value = 0;
        if (stream >> value && stream.peek() == EOF && least <= value &&
            value <= most) {
          return "";
        }
        return "a whole number from " + std::to_string(least) + " to " +
            std::to_string(most) + ", but got \"" + text + "\"";
      },
      "");
}

inline CLI::Validator one_of(const std::vector<std::string>& known) {
  return CLI::Validator(
      [known](const std::string& text) -> std::string {
        if (std::find(known.begin(), known.end(), text) != known.end()) {
          return "";
        }
        return "out of " + joined(known) + ", but got \"" + text + "\"";
      },
      "");
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

} // namespace detail

/// Reads the command line. Nothing is returned where --help or --version was
/// all that was asked for.
///
/// Throws:   Error if an argument is unknown or out of range.
inline std::optional<Config> parse_command_line(int argc, const char** argv) {
  using detail::from_to;
  using detail::joined;
  using detail::one_of;
  constexpr int64_t kMost = 1000000000;
  Config config;
  CLI::App app(
      "Measures one training step of one network under several engines: time, "
      "memory of tensors,\nand how far the gradients are from those of "
      "ordinary autograd. All engines have the same\nweights and image. The "
      "network is a convolution and couplings over the two halves of its\n"
      "channels, with F and G = batch normalisation, ReLU, convolution, twice. "
      "A step is forward,\nloss and backward, without an optimiser.",
      "memcnn_benchmark");
  app.set_version_flag("--version", "memcnn_benchmark " + support::version());
  app.option_defaults()->always_capture_default();

  app.add_option(
         "--engines",
         config.engines,
         "Comma-separated, out of " + joined(engine_names()))
      ->delimiter(',')
      ->check(one_of(engine_names()));
  app.add_option("--depth", config.depth, "Couplings")
      ->check(from_to(1, kMost));
  app.add_option("--channels", config.channels, "Channels of one half")
      ->check(from_to(1, kMost));
  app.add_option("--batch", config.batch, "Images in a step")
      ->check(from_to(1, kMost));
  app.add_option("--size", config.size, "Height and width of an image")
      ->check(from_to(1, kMost));
  app.add_option(
         "--coupling",
         config.coupling,
         joined(coupling_names()) +
             " (additive with 16 fractional bits: reconstruction is exact)")
      ->check(one_of(coupling_names()));
  app.add_option(
         "--dtype",
         config.dtype,
         "Of weights and image: " + joined(dtype_names()))
      ->check(one_of(dtype_names()));
  app.add_option(
         "--memory-format",
         config.memory_format,
         "Of weights and image: " + joined(memory_format_names()) +
             " (faster convolutions on a CPU)")
      ->check(one_of(memory_format_names()));
  app.add_option(
         "--sequence-format",
         config.sequence_format,
         "Memory format in which halves travel in a sequence, whatever the "
         "image has: " +
             joined(sequence_format_names()))
      ->check(one_of(sequence_format_names()));
  app.add_option(
      "--budget",
      config.budget,
      "What sequence-budget may keep: a number of MiB, a percentage of what "
      "plain holds, or all");
  app.add_option("--device", config.device, joined(device_names()))
      ->check(one_of(device_names()));
  app.add_option("--threads", config.threads, "Threads on the CPU")
      ->check(from_to(1, 1024));
  app.add_option("--seed", config.seed, "Seed of weights and image")
      ->check(from_to(0, kMost));
  app.add_option(
         "--steps",
         config.steps,
         "Timed rounds, one step of each engine a round")
      ->check(from_to(1, kMost));
  app.add_option("--warmup", config.warmup, "Rounds before the timed ones")
      ->check(from_to(0, kMost));
  app.add_flag(
      "--default-allocator",
      config.default_allocator,
      "Let the C library give freed memory back to the system, as it does by "
      "itself");
  app.add_flag(
      "--json", config.json, "One JSON object an engine and line, no table");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ExtrasError&) {
    throw support::Error(
        "expected arguments out of " + detail::known_flags(app) +
        ", but got \"" + app.remaining().front() + "\".");
  } catch (const CLI::ValidationError& error) {
    std::string text = error.what(); // "--flag: a number ..., but got ..."
    const auto colon = text.find(": ");
    if (colon != std::string::npos) {
      text.replace(colon, 2, " to be ");
    }
    throw support::Error("expected " + text + ". See memcnn_benchmark --help.");
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      app.exit(error);
      return std::nullopt;
    }
    throw support::Error(
        "expected a valid command line, but got: " + std::string(error.what()) +
        ". See memcnn_benchmark --help.");
  }
  static_cast<void>(Budget(config.budget)); // an error before the first step
  return config;
}

} // namespace benchmark
