// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/checksum.h"
#include "train/base/files.h"

#include <fmt/format.h>

#include <cstddef>
#include <filesystem>
#include <sstream>
#include <string>
#include <system_error>

namespace training {

/// The checkpoints of a run on disk: the last one, and the one before it.
///
/// A file begins with a line that says what the rest must be,
/// `memcnn-checkpoint <format> <bytes> <checksum>`, so that a damaged one is
/// known for what it is before anything is made of it.
class CheckpointFiles final {
 public:
  static constexpr int kFormat = 1;

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
    write_file(
        last_,
        fmt::format(
            "{} {} {} {}\n",
            kMagic,
            kFormat,
            content.size(),
            checksum_text(checksum(content))) +
            content);
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
    const auto end = sealed->find('\n');
    std::istringstream line(sealed->substr(0, end));
    std::string magic;
    int format = 0;
    line >> magic >> format;
    if (magic != kMagic || !line || end == std::string::npos) {
      throw support::Error(fmt::format(
          "expected {} to be a checkpoint of this program, but it is "
          "something else or damaged.{}",
          path.string(),
          advice(path)));
    }
    if (format != kFormat) {
      throw support::Error(fmt::format(
          "expected the checkpoint {} to have format {}, but got {}: "
          "another version of memcnn_train wrote it. Go on with that "
          "version, or give --fresh to overwrite it or another "
          "--results-dir.",
          path.string(),
          kFormat,
          format));
    }
    size_t size = 0;
    std::string sum;
    line >> size >> sum;
    std::string content = sealed->substr(end + 1);
    const std::string found = checksum_text(checksum(content));
    if (!line || content.size() != size || found != sum) {
      throw support::Error(fmt::format(
          "expected the checkpoint {} to have {} bytes with checksum {}, "
          "but got {} with {}: it is damaged.{}",
          path.string(),
          size,
          sum,
          content.size(),
          found,
          advice(path)));
    }
    return content;
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
  static constexpr const char* kMagic = "memcnn-checkpoint";

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
