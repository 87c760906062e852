// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/files.h"
#include "train/base/format_error.h"
#include "train/run/seal.h"

#include <fmt/format.h>

#include <filesystem>
#include <string>
#include <system_error>

namespace training {

/// The checkpoints of a run on disk: the last one, and the one before it.
class CheckpointFiles final {
 public:
  explicit CheckpointFiles(const std::filesystem::path& directory)
      : last_(directory / "checkpoint.memcnn"),
        previous_(directory / "checkpoint.previous.memcnn") {}

  const std::filesystem::path& last() const {
    return last_;
  }

  const std::filesystem::path& previous() const {
    return previous_;
  }

  /// Makes `content` the last checkpoint, and the last one the previous. At
  /// every moment there is a whole last one, if there was one before.
  ///
  /// Throws:   Error if that fails; both are then as they were.
  void write(const std::string& content) const {
    if (is_there(last_)) {
      keep_as_previous();
    }
    write_file(last_, seal(content));
  }

  /// What write() was given.
  ///
  /// Throws:   Error if the file is damaged, or no checkpoint of this version.
  std::string read(const std::filesystem::path& path) const {
    const auto sealed = read_file(path);
    if (!sealed) {
      throw support::Error(fmt::format(
          "expected the checkpoint {} to be readable, but reading it "
          "failed.{}",
          path.string(),
          advice(path)));
    }
    try {
      return unseal(*sealed);
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
    std::error_code error;
    std::filesystem::rename(previous_, last_, error);
    if (error) {
      detail::stop_on_write(last_, error);
    }
  }

  /// Forgets both.
  void remove() const {
    std::error_code ignored;
    std::filesystem::remove(previous_, ignored);
    std::filesystem::remove(last_, ignored);
  }

 private:
  /// By a second name for the same file, so that the first stays in place.
  void keep_as_previous() const {
    const std::filesystem::path spare = previous_.string() + ".partial";
    std::error_code error;
    std::filesystem::remove(spare, error);
    std::filesystem::create_hard_link(last_, spare, error);
    if (error) { // a file system without second names
      std::filesystem::copy_file(last_, spare, error);
    }
    if (!error) {
      std::filesystem::rename(spare, previous_, error);
    }
    // Renaming one name of a file to another name of it does nothing.
    std::error_code ignored;
    std::filesystem::remove(spare, ignored);
    if (error) {
      detail::stop_on_write(previous_, error);
    }
  }

  std::string advice(const std::filesystem::path& path) const {
    return path == last_ && is_there(previous_)
        ? fmt::format(
              " Give --from-previous to go on from {}, or --fresh to start "
              "anew.",
              previous_.string())
        : " Give --fresh to overwrite it, or another --results-dir.";
  }

  std::filesystem::path last_;
  std::filesystem::path previous_;
};

} // namespace training
