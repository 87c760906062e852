// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/config.h"
#include "train/base/files.h"
#include "train/base/new_file.h"
#include "train/data/data_set.h"
#include "train/run/checkpoint_files.h"
#include "train/run/file_names.h"
#include "train/run/log.h"
#include "train/run/results_dir.h"

#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <vector>

namespace training {

namespace detail {

/// What a run reads of its data set and keeps in its results directory.
inline std::vector<std::filesystem::path> own_files(const Config& config) {
  auto files = dataset_files(config);
  const std::filesystem::path folder = config.results_dir;
  files.push_back(folder / kLockName);
  for (const std::string name :
       {kRunName,
        kLogName,
        kResultsName,
        CheckpointFiles::kLast,
        CheckpointFiles::kPrevious}) {
    files.push_back(folder / name);
    files.push_back(folder / (name + kPartialSuffix));
  }
  return files;
}

} // namespace detail

/// Refuses to put the weights in the place of a file that the run itself needs.
inline void check_save_weights(const Config& config) {
  for (const auto& file : detail::own_files(config)) {
    if (is_same_file(config.save_weights, file)) {
      throw support::Error(fmt::format(
          "expected --save-weights to be a file that the run has no other use "
          "for, but got {}. Give another --save-weights.",
          config.save_weights));
    }
  }
}

} // namespace training
