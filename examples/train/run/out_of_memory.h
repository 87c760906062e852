// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/config.h"
#include "train/base/run_settings.h"
#include "train/run/checkpoint_files.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <system_error>

namespace training {

/// What LibTorch says, without the link and the lines that it adds for all.
inline std::string reason_of(const c10::Error& error) {
  const std::string text = error.what_without_backtrace();
  const std::string line = text.substr(0, text.find('\n'));
  return line.substr(0, line.find("  See documentation"));
}

/// What a run says for which a GPU has too little memory, whatever it did then.
/// A step that was begun is lost, and no file is. `first` and `last` are what the
/// program has to lower it, beside what all have.
inline support::Error out_of_memory(
    const RunSettings& config,
    const c10::OutOfMemoryError& error,
    const std::string& first = "",
    const std::string& last = "") {
  const auto checkpoint =
      std::filesystem::path(config.results_dir) / CheckpointFiles::kLast;
  std::error_code ignored;
  const bool saved = std::filesystem::exists(checkpoint, ignored);
  return support::Error(fmt::format(
      "expected the GPU to have the memory for batches of {} images, but got: "
      "{} Stop other programs on it, {}or train another run with a lower "
      "--batch-size{}. {}",
      config.batch_size,
      reason_of(error),
      first,
      last,
      saved ? fmt::format(
                  "The checkpoint {} is whole, and the same command goes on "
                  "from it.",
                  checkpoint.string())
            : "No checkpoint was written yet."));
}

/// Likewise of memcnn_train.
inline support::Error out_of_memory(
    const Config& config,
    const c10::OutOfMemoryError& error) {
  return out_of_memory(
      config,
      error,
      config.cuda_graph.value_or(true)
          ? "give --no-cuda-graph, whose steps share memory with all else, "
          : "",
      config.memory_budget > 0 ? " or --memory-budget" : "");
}

} // namespace training
