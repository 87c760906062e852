// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/descriptor.h"
#include "train/base/folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>

#include <cerrno>
#include <filesystem>

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

} // namespace detail

/// The folder of one run, made where it is missing, and this program's own
/// until the end of scope: two runs in one folder would overwrite each other's
/// checkpoints.
///
/// The folder itself is locked, which nobody deletes by mistake. So is a file
/// in it: network file systems lock nothing else.
class ResultsDir final {
 public:
  /// Throws:   Error if no file can be made in the folder, or another run is in
  ///           it.
  explicit ResultsDir(const std::filesystem::path& path)
      : folder_(path, "--results-dir"),
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

  const Folder& folder() const {
    return folder_;
  }

 private:
  Folder folder_;
  Descriptor lock_;
};

} // namespace training
