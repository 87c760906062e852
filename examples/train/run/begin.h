// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/config.h"
#include "train/base/files.h"
#include "train/base/format_error.h"
#include "train/run/checkpoint.h"
#include "train/run/checkpoint_files.h"
#include "train/run/log.h"
#include "train/run/print.h"
#include "train/run/run_state.h"
#include "train/step/trainer.h"
#include "train/weights/python_weights.h"

#include <fmt/format.h>

#include <cstdint>
#include <filesystem>

namespace training {

namespace detail {

inline RunState restore(
    const Config& config,
    uint32_t fingerprint,
    const CheckpointFiles& checkpoints,
    const std::filesystem::path& path,
    Trainer& trainer) {
  try {
    return restore_checkpoint(
        checkpoints.read(path), path, config, fingerprint, trainer);
  } catch (const FormatError& flaw) {
    checkpoints.refuse(path, flaw);
  }
}

inline RunState resume(
    const Config& config,
    uint32_t fingerprint,
    const CheckpointFiles& checkpoints,
    const std::filesystem::path& log,
    Trainer& trainer) {
  const auto& path =
      config.from_previous ? checkpoints.previous() : checkpoints.last();
  RunState state = restore(config, fingerprint, checkpoints, path, trainer);
  if (state.log.bytes > 0 && !is_there(log)) {
    print_warning(fmt::format(
        "the log {} is gone, and begins anew after iteration {}",
        log.string(),
        state.iteration));
    state.log = LogMark();
  }
  check_log(log, state.log, path);
  if (config.from_previous) {
    checkpoints.go_back();
  }
  say("going on from {} at iteration {}", path.string(), state.iteration);
  if (!config.load_weights.empty()) {
    say("not reading {}: the run started from it", config.load_weights);
  }
  return state;
}

} // namespace detail

/// Where a run begins: at its last checkpoint, if there is one and none of the
/// flags says otherwise, else at its first step, with random or given weights.
/// Fills the trainer with what belongs to it. `log` is the log of the directory.
///
/// Throws:   Error if the checkpoint, its log or the weights are not ones to
///           begin with; the files are then as they were.
inline RunState begin(
    const Config& config,
    uint32_t fingerprint,
    const CheckpointFiles& checkpoints,
    const std::filesystem::path& log,
    Trainer& trainer) {
  if (!config.fresh && (config.from_previous || is_there(checkpoints.last()))) {
    return detail::resume(config, fingerprint, checkpoints, log, trainer);
  }
  if (!config.load_weights.empty()) {
    load_python_weights(config.load_weights, config.model, trainer.network());
  }
  checkpoints.remove();
  return {};
}

} // namespace training
