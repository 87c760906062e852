// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <fmt/format.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#endif

namespace training {

/// The folder of one run, made where it is missing, and this program's own
/// until the end of scope: two runs in one folder would overwrite each other's
/// checkpoints.
///
/// The system drops the lock with the process, however that ends. Other systems
/// than Linux and macOS have none here.
class ResultsDir final {
 public:
  /// Throws:   Error if no file can be made in the folder, or another run is in
  ///           it.
  explicit ResultsDir(const std::filesystem::path& path) : path_(path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    const auto lock = path / "lock";
#if defined(__unix__) || defined(__APPLE__)
    lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    const bool writable = lock_ >= 0;
#else
    const bool writable = static_cast<bool>(std::ofstream(lock));
#endif
    if (!writable) {
      throw support::Error(fmt::format(
          "expected the results directory {} to be writable, but no file "
          "can be made in it. Give another --results-dir.",
          path.string()));
    }
#if defined(__unix__) || defined(__APPLE__)
    // A file system without locks is no reason not to train.
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(lock_);
      throw support::Error(fmt::format(
          "expected the results directory {} to be free, but another run "
          "is using it. Wait for its end, or give another --results-dir.",
          path.string()));
    }
#endif
  }

  ~ResultsDir() {
#if defined(__unix__) || defined(__APPLE__)
    ::close(lock_);
#endif
  }

  ResultsDir(const ResultsDir&) = delete;
  ResultsDir& operator=(const ResultsDir&) = delete;

  const std::filesystem::path& path() const {
    return path_;
  }

 private:
  std::filesystem::path path_;
  int lock_ = -1;
};

} // namespace training
