// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/files.h"

#include <nlohmann/json.hpp>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>

namespace training {

/// The log of a run: one JSON object per line and row. docs/training.md has
/// its fields.
class Log {
 public:
  /// Starts with the rows that a checkpoint has. Those that a run wrote after
  /// its last checkpoint are computed again, and would be there twice.
  Log(const std::filesystem::path& path, const nlohmann::ordered_json& rows)
      : path_(path) {
    std::string text;
    for (const auto& row : rows) {
      text += row.dump() + "\n";
    }
    write_file(path, text);
    file_.open(path, std::ios::binary | std::ios::app);
  }

  /// Adds a row, in one piece: readers of a running run see whole lines.
  ///
  /// Throws:   Error if that fails.
  void add(const nlohmann::ordered_json& row) {
    errno = 0;
    file_ << row.dump() + "\n" << std::flush;
    if (!file_) {
      detail::stop_on_write(path_);
    }
  }

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

} // namespace training
