// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/folder.h"
#include "train/base/run_settings.h"
#include "train/run/checkpoint_files.h"
#include "train/run/file_names.h"
#include "train/run/log.h"
#include "train/run/results_dir.h"

#include <optional>

namespace training {

/// The files of a run, which its leader alone has.
class RunFiles final {
 public:
  /// Throws:   Error if one of them cannot be written, or another run has them.
  explicit RunFiles(const RunSettings& config)
      : directory_(config.results_dir), checkpoints_(directory_.folder()) {
    for (const char* name : {kRunName, kLogName, kResultsName}) {
      folder().check_place(name);
    }
  }

  RunFiles(const RunFiles&) = delete;
  RunFiles& operator=(const RunFiles&) = delete;

  /// Says that the run is not refused any more: its log goes on behind the mark,
  /// and what is there of another run, or of an earlier end of this one, goes.
  void keep(const LogMark& mark) {
    directory_.keep();
    folder().remove(kResultsName);
    log_.emplace(folder(), mark);
  }

  const Folder& folder() const {
    return directory_.folder();
  }

  const CheckpointFiles& checkpoints() const {
    return checkpoints_;
  }

  /// Of a run that is kept.
  Log& log() {
    return *log_;
  }

 private:
  ResultsDir directory_;
  CheckpointFiles checkpoints_;
  std::optional<Log> log_;
};

} // namespace training
