// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/checksum.h"
#include "train/base/descriptor.h"
#include "train/base/file_bytes.h"
#include "train/base/folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace training {

/// How much of a log belongs to a checkpoint, and how to know it again.
struct LogMark {
  size_t bytes = 0;
  uint32_t checksum = 0; // of these bytes
};

inline constexpr const char* kLogName = "log.jsonl";
inline constexpr std::string_view kLogStart = "{\"iteration\":"; // of any row

/// Refuses a log that does not begin with what a checkpoint knows of.
inline void check_log(
    const Folder& folder,
    const LogMark& mark,
    const std::filesystem::path& checkpoint) {
  const std::string rows = folder.read(kLogName).bytes.substr(0, mark.bytes);
  if (rows.size() != mark.bytes || checksum(rows) != mark.checksum) {
    throw support::Error(fmt::format(
        "expected the log {} to begin with the {} bytes with checksum {} that "
        "the checkpoint {} knows of, but got {} with {}: it is damaged. "
        "Restore it, delete it to go on without these rows, or give --fresh to "
        "start anew.",
        (folder.path() / kLogName).string(),
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
  Log(const Folder& folder, const LogMark& mark)
      : folder_(folder),
        mark_(mark),
        file_(folder.open(kLogName, O_WRONLY | O_APPEND | O_CREAT)) {
    if (!file_.is_open() ||
        ::ftruncate(file_.number(), static_cast<off_t>(mark.bytes)) != 0) {
      folder_.stop_on_write(kLogName, last_error());
    }
  }

  /// Adds a row, in one piece: readers of a running run see whole lines.
  ///
  /// Throws:   Error if that fails, or the log was deleted: what is written to
  ///           it would go with it.
  void add(const nlohmann::ordered_json& row) {
    const std::string line = row.dump() + "\n";
    if (const auto error = write_all(file_.number(), line)) {
      folder_.stop_on_write(kLogName, error);
    }
    struct stat written {};
    if (::fstat(file_.number(), &written) == 0 && written.st_nlink == 0) {
      stop_on_deletion();
    }
    mark_ = {
        mark_.bytes + line.size(), training::checksum(line, mark_.checksum)};
  }

  /// All rows so far. They are on the disk by then: a checkpoint that knows of
  /// them must not outlive them in a power cut.
  LogMark mark() const {
    flush_to_disk(file_.number());
    return mark_;
  }

 private:
  [[noreturn]] void stop_on_deletion() const {
    throw support::Error(fmt::format(
        "expected the log {} to be there until all is written, but it was "
        "deleted. Give the same command again to go on from the last "
        "checkpoint.",
        (folder_.path() / kLogName).string()));
  }

  const Folder& folder_;
  LogMark mark_;
  Descriptor file_;
};

} // namespace training
