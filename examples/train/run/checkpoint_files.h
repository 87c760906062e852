// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/file_bytes.h"
#include "train/base/folder.h"
#include "train/base/format_error.h"
#include "train/base/new_file.h"
#include "train/run/seal.h"

#include <fmt/format.h>

#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>

namespace training {

/// The checkpoints of a run on disk: the last one, and the one before it.
class CheckpointFiles final {
 public:
  static constexpr const char* kLast = "checkpoint.memcnn";
  static constexpr const char* kPrevious = "checkpoint.previous.memcnn";

  /// Throws:   Error if something else than a file has the name of one.
  explicit CheckpointFiles(const Folder& folder) : folder_(folder) {
    folder.check_place(kLast);
    folder.check_place(kPrevious);
  }

  std::filesystem::path last() const {
    return folder_.path() / kLast;
  }

  std::filesystem::path previous() const {
    return folder_.path() / kPrevious;
  }

  bool has_last() const {
    return folder_.has(kLast);
  }

  bool has_previous() const {
    return folder_.has(kPrevious);
  }

  /// Makes `content` the last checkpoint, and the last one the previous. At
  /// every moment there is a whole last one, if there was one before.
  ///
  /// Throws:   Error if that fails; where the disk is full, both are then as
  ///           they were.
  void write(const std::string& content) const {
    NewFile file(folder_, kLast, seal(content));
    if (has_last()) {
      keep_as_previous();
    }
    file.take_name();
  }

  /// What write() was given.
  ///
  /// Throws:   Error if the file is damaged, or no checkpoint of this version.
  std::string read(const std::filesystem::path& path) const {
    try {
      // Before much is read of what may be anything.
      const auto start = read_bytes(path, kMostSealBytes);
      parse_seal(start.bytes, start.file_bytes);
      return unseal(read_bytes(path, kAllBytes).bytes);
    } catch (const FormatError& flaw) {
      refuse(path, flaw);
    }
  }

  /// Tells what is wrong with one of them, and what there is instead.
  [[noreturn]] void refuse(
      const std::filesystem::path& path,
      const FormatError& flaw) const {
    throw support::Error(fmt::format(
        "expected {} to be a checkpoint of this program, but {}.{}",
        path.string(),
        flaw.what(),
        advice(path)));
  }

  /// Makes the previous checkpoint the last one, over what is there.
  void go_back() const {
    if (const auto error = folder_.rename(kPrevious, kLast)) {
      folder_.stop_on_write(kLast, error);
    }
  }

  /// Forgets both.
  ///
  /// Throws:   Error if that fails.
  void remove() const {
    folder_.remove(kPrevious);
    folder_.remove(kLast);
  }

 private:
  static constexpr const char* kSpare =
      "checkpoint.previous.memcnn.memcnn-partial";

  /// By a second name for the same file, so that the first stays in place.
  void keep_as_previous() const {
    folder_.remove(kSpare);
    // Where a file has one name only, it is without it for a moment: a run that
    // is killed then goes on with --from-previous.
    const std::error_code single = folder_.link(kLast, kSpare);
    const auto error = folder_.rename(single ? kLast : kSpare, kPrevious);
    if (error) {
      folder_.stop_on_write(kPrevious, error);
    }
    // Renaming one name of a file to another name of it does nothing.
    folder_.remove(kSpare);
  }

  FileContent read_bytes(const std::filesystem::path& path, size_t most) const {
    auto content = folder_.read(path.filename(), most);
    if (!content.problem.empty()) {
      throw support::Error(fmt::format(
          "expected the checkpoint {} to be readable, but reading it "
          "failed: {}.{}",
          path.string(),
          content.problem,
          advice(path)));
    }
    return content;
  }

  std::string advice(const std::filesystem::path& path) const {
    return path == last() && has_previous()
        ? fmt::format(
              " Give --from-previous to go on from {}, or --fresh to start "
              "anew.",
              previous().string())
        : " Give --fresh to overwrite it, or another --results-dir.";
  }

  const Folder& folder_;
};

} // namespace training
