// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/folder.h"
#include "train/base/format_error.h"
#include "train/base/run_settings.h"
#include "train/run/checkpoint.h"
#include "train/run/checkpoint_content.h"
#include "train/run/checkpoint_files.h"
#include "train/run/file_names.h"
#include "train/run/log.h"
#include "train/run/run_state.h"
#include "train/run/say.h"
#include "train/team/team.h"

#include <fmt/format.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace training {

namespace detail {

template <class Config, class Trainer>
RunState restore(
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

/// Says what is lost where the last checkpoint could be read, such as where the
/// same command is given twice.
inline void warn_of_loss(const CheckpointFiles& checkpoints) {
  try {
    const auto last = checkpoints.last();
    const Checkpoint lost = parse_checkpoint(checkpoints.read(last));
    print_warning(fmt::format(
        "the checkpoint {} is whole, but --from-previous gives up what it has "
        "of iteration {}",
        last.string(),
        lost.state.iteration));
  } catch (const std::exception&) { // damaged or gone: nothing is lost
  }
}

/// Says what is not as if the run had never stopped.
inline void warn_of_processes(
    const std::filesystem::path& path,
    int64_t found,
    int64_t now) {
  if (found != now) {
    print_warning(fmt::format(
        "the checkpoint {} is of a run of {} process{}, and goes on with {}: "
        "each normalises over another share of a batch, and losses differ",
        path.string(),
        found,
        found == 1 ? "" : "es",
        now));
  }
}

template <class Config, class Trainer>
RunState resume(
    const Config& config,
    uint32_t fingerprint,
    const CheckpointFiles& checkpoints,
    const Folder& folder,
    Trainer& trainer) {
  const auto path =
      config.from_previous ? checkpoints.previous() : checkpoints.last();
  RunState state = restore(config, fingerprint, checkpoints, path, trainer);
  if (state.log.bytes > 0 && !folder.has(kLogName)) {
    print_warning(fmt::format(
        "the log {} is gone, and begins anew after iteration {}",
        (folder.path() / kLogName).string(),
        state.iteration));
    state.log = LogMark();
  }
  check_log(folder, state.log, path);
  if (config.from_previous) {
    warn_of_loss(checkpoints);
    checkpoints.go_back();
  }
  warn_of_processes(path, state.processes, trainer.team().size());
  say("going on from {} at iteration {}", path.string(), state.iteration);
  if (config.iterations != state.iterations) {
    say("training for {} iterations instead of {}{}",
        config.iterations,
        state.iterations,
        Config::kRateFollowsLength
            ? ": from here on the learning rate falls where it does in a run of "
              "that length"
            : "");
    state.change_length(config.iterations);
  }
  return state;
}

/// As after a kill at a bad moment, or by hand: to start anew would delete the
/// other one.
inline void stop_on_lost_checkpoint(const CheckpointFiles& checkpoints) {
  throw support::Error(fmt::format(
      "expected the checkpoint {} to be there, since {} is, but there is none. "
      "Give --from-previous to go on from the one that is there, or --fresh to "
      "start anew.",
      checkpoints.last().string(),
      checkpoints.previous().string()));
}

/// Refuses to overwrite a file that has the name of one of ours, but begins as
/// no run would have it.
inline void check_is_ours(
    const Folder& folder,
    const std::string& name,
    std::string_view start) {
  const std::string found = folder.read(name, start.size()).bytes;
  // A run that was killed may have left a part of it.
  if (start.substr(0, found.size()) != found) {
    throw support::Error(fmt::format(
        "expected {} to be nothing yet, or of a run of this program, but it "
        "begins otherwise. Move it away, give another --results-dir, or "
        "--fresh to overwrite it.",
        (folder.path() / name).string()));
  }
}

/// Looks for what a run in the folder has left, where there is no checkpoint to
/// go on from, before a new one overwrites it.
inline void check_left_behind(
    const CheckpointFiles& checkpoints,
    const Folder& folder) {
  if (checkpoints.has_previous()) {
    stop_on_lost_checkpoint(checkpoints);
  }
  check_is_ours(folder, kRunName, kResultsStart);
  check_is_ours(folder, kLogName, kLogStart);
  check_is_ours(folder, kResultsName, kResultsStart);
  const bool has_rows = folder.read(kLogName, /*most=*/1).file_bytes > 0;
  // A run that has evaluated only has a log without rows, and no checkpoint.
  const bool has_trained = has_rows || !folder.has(kLogName);
  if (has_trained && folder.has(kResultsName)) {
    throw support::Error(fmt::format(
        "expected the checkpoint {} to be there, since {} is, but there is "
        "none. Give --fresh to overwrite the run that is done, or another "
        "--results-dir.",
        checkpoints.last().string(),
        (folder.path() / kResultsName).string()));
  }
  if (has_rows) { // of a run that was killed before its first checkpoint
    print_warning(fmt::format(
        "the log {} has rows of a run without a checkpoint, and begins anew",
        (folder.path() / kLogName).string()));
  }
}

} // namespace detail

/// Where a run begins: at its last checkpoint, if there is one and none of the
/// flags says otherwise, else at its first step, which `prepare` makes ready for.
/// Fills the trainer with what belongs to it. Checkpoints and log are in the
/// folder.
///
/// Throws:   Error if the checkpoint or its log are not ones to begin with, or
///           `prepare` does; the files are then as they were.
template <class Config, class Trainer>
RunState begin(
    const Config& config,
    uint32_t fingerprint,
    const CheckpointFiles& checkpoints,
    const Folder& folder,
    Trainer& trainer,
    const std::function<void()>& prepare = [] {}) {
  if (!config.fresh && (config.from_previous || checkpoints.has_last())) {
    return detail::resume(config, fingerprint, checkpoints, folder, trainer);
  }
  if (!config.fresh) {
    detail::check_left_behind(checkpoints, folder);
  }
  prepare();
  checkpoints.remove();
  RunState state;
  state.iterations = config.iterations;
  return state;
}

/// Where all processes begin: the leader has found out, and the others learn it
/// from the checkpoint that it would write now. They need no files, and cannot
/// disagree.
template <class Config, class Trainer>
RunState begin_as_leader(
    const Config& config,
    uint32_t fingerprint,
    RunState state,
    Trainer& trainer) {
  Team& team = trainer.team();
  state.processes = team.size();
  if (team.size() > 1) {
    team.from_leader(make_checkpoint(config, fingerprint, state, trainer));
  }
  return state;
}

/// Likewise as one of the others.
template <class Config, class Trainer>
RunState begin_with_leader(
    const Config& config,
    uint32_t fingerprint,
    Trainer& trainer) {
  const std::string bytes = trainer.team().from_leader("");
  return restore_checkpoint(
      bytes, "of the leader", config, fingerprint, trainer);
}

} // namespace training
