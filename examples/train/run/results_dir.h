// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/descriptor.h"
#include "train/base/folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <system_error>
#include <vector>

namespace training {

inline constexpr const char* kLockName = "lock";

namespace detail {

/// Whether another program has the lock, or takes it. The system drops it with
/// the process, however that ends. A file system without locks is no reason not
/// to train.
inline bool is_taken(const Descriptor& descriptor) {
  return ::flock(descriptor.number(), LOCK_EX | LOCK_NB) != 0 &&
      errno == EWOULDBLOCK;
}

/// What of a path is still to be made, the innermost first.
inline std::vector<std::filesystem::path> missing_folders(
    std::filesystem::path path) {
  std::vector<std::filesystem::path> missing;
  std::error_code ignored; // making them says what is wrong
  for (; !path.empty() && !std::filesystem::exists(path, ignored);
       path = path.parent_path()) {
    missing.push_back(path);
  }
  return missing;
}

} // namespace detail

/// The folder of one run, made where it is missing, and this program's own
/// until the end of scope: two runs in one folder would overwrite each other's
/// checkpoints.
///
/// The folder itself is locked, which nobody deletes by mistake. So is a file
/// in it: network file systems lock nothing else. A run that is refused leaves
/// neither, where it made them.
class ResultsDir final {
 public:
  /// Throws:   Error if no file can be made in the folder, or another run is in
  ///           it.
  explicit ResultsDir(const std::filesystem::path& path)
      : missing_before_(detail::missing_folders(path)),
        folder_(path, "--results-dir"),
        lock_is_new_(!folder_.has(kLockName)),
        lock_(folder_.open(kLockName, O_RDWR | O_CREAT)) {
    if (!lock_.is_open()) {
      folder_.stop_on_unwritable();
    }
    if (detail::is_taken(folder_.descriptor()) || detail::is_taken(lock_)) {
      throw support::Error(fmt::format(
          "expected the results directory {} to be free, but another run "
          "is using it. Wait for its end, or give another --results-dir.",
          path.string()));
    }
  }

  ~ResultsDir() {
    if (kept_) {
      return;
    }
    if (lock_is_new_) {
      ::unlinkat(folder_.descriptor().number(), kLockName, /*flags=*/0);
    }
    for (const auto& folder : missing_before_) {
      std::error_code ignored; // such as where something else is in it by now
      std::filesystem::remove(folder, ignored);
    }
  }

  ResultsDir(const ResultsDir&) = delete;
  ResultsDir& operator=(const ResultsDir&) = delete;

  /// Says that the run is not refused any more.
  void keep() {
    kept_ = true;
  }

  const Folder& folder() const {
    return folder_;
  }

 private:
  bool kept_ = false;
  std::vector<std::filesystem::path> missing_before_;
  Folder folder_;
  bool lock_is_new_;
  Descriptor lock_;
};

} // namespace training
