// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/checksum.h"
#include "train/base/files.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

namespace training {

/// How much of a log belongs to a checkpoint, and how to know it again.
struct LogMark {
  size_t bytes = 0;
  uint32_t checksum = 0; // of these bytes
};

/// Refuses a log that does not begin with what a checkpoint knows of.
inline void check_log(
    const std::filesystem::path& path,
    const LogMark& mark,
    const std::filesystem::path& checkpoint) {
  const std::string rows = read_file(path).value_or("").substr(0, mark.bytes);
  if (rows.size() != mark.bytes || checksum(rows) != mark.checksum) {
    throw support::Error(fmt::format(
        "expected the log {} to begin with the {} bytes with checksum {} that "
        "the checkpoint {} knows of, but got {} with {}: it is damaged. "
        "Restore it, delete it to go on without these rows, or give --fresh to "
        "start anew.",
        path.string(),
        mark.bytes,
        checksum_text(mark.checksum),
        checkpoint.string(),
        rows.size(),
        checksum_text(checksum(rows))));
  }
}

/// The log of a run: one JSON object per line and row. docs/training.md has
/// its fields.
class Log final {
 public:
  /// Goes on behind the mark of a checkpoint. Rows that a run wrote after it are
  /// cut off: they are computed again, and would be there twice.
  ///
  /// Throws:   Error if that fails.
  Log(const std::filesystem::path& path, const LogMark& mark)
      : path_(path), mark_(mark) {
    errno = 0;
    file_.open(path, std::ios::binary | std::ios::app);
    stop_unless_written();
    std::error_code error;
    std::filesystem::resize_file(path, mark.bytes, error);
    if (error) {
      detail::stop_on_write(path, error);
    }
  }

  /// Adds a row, in one piece: readers of a running run see whole lines.
  ///
  /// Throws:   Error if that fails.
  void add(const nlohmann::ordered_json& row) {
    const std::string line = row.dump() + "\n";
    errno = 0;
    file_ << line << std::flush;
    stop_unless_written();
    mark_ = {
        mark_.bytes + line.size(), training::checksum(line, mark_.checksum)};
  }

  /// All rows so far. They are on the disk by then: a checkpoint that knows of
  /// them must not outlive them in a power cut.
  LogMark mark() const {
    detail::flush_to_disk(path_);
    return mark_;
  }

 private:
  void stop_unless_written() const {
    if (!file_) {
      detail::stop_on_write(path_, detail::last_error());
    }
  }

  std::filesystem::path path_;
  LogMark mark_;
  std::ofstream file_;
};

} // namespace training
