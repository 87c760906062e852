// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/descriptor.h"
#include "train/base/file_bytes.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

namespace training {

namespace detail {

/// Whether this program prints into that file.
inline bool is_printed_to(const struct stat& file) {
  for (const int stream : {STDOUT_FILENO, STDERR_FILENO}) {
    struct stat printed {};
    if (::fstat(stream, &printed) == 0 && printed.st_dev == file.st_dev &&
        printed.st_ino == file.st_ino) {
      return true;
    }
  }
  return false;
}

/// Why no file is to be put at `name` in a folder, or AT_FDCWD; empty where it
/// may be.
inline std::string obstacle_at(int folder, const std::string& name) {
  struct stat found {};
  if (::fstatat(folder, name.c_str(), &found, /*flags=*/0) != 0) {
    return ""; // mostly nothing yet; else opening it says more
  }
  const std::string other = other_than_file(found);
  return other.empty() && is_printed_to(found) ? "what this program prints into"
                                               : other;
}

[[noreturn]] inline void stop_on_obstacle(
    const std::filesystem::path& path,
    const std::string& obstacle,
    const std::string& flag) {
  throw support::Error(fmt::format(
      "expected {} to be a file or nothing yet, but it is {}. Move it away, or "
      "give another {}.",
      path.string(),
      obstacle,
      flag));
}

} // namespace detail

/// A folder, and the files in it by their names. Its path is looked up once:
/// where the folder is moved, its files stay in it; where it is deleted and
/// another one made in its place, nothing gets into that one.
class Folder final {
 public:
  /// Makes the folder where it is missing. `flag` is what the user may change.
  ///
  /// Throws:   Error if there is none, or it is not for this user.
  Folder(const std::filesystem::path& path, std::string flag)
      : path_(path),
        flag_(std::move(flag)),
        descriptor_(made_and_opened(path)) {
    if (!descriptor_.is_open()) {
      stop_on_unwritable();
    }
  }

  const std::filesystem::path& path() const {
    return path_;
  }

  const Descriptor& descriptor() const {
    return descriptor_;
  }

  Descriptor open(const std::string& name, int how) const {
    constexpr mode_t kAnybody = 0666; // but for what the umask takes away
    return Descriptor(::openat(
        descriptor_.number(),
        name.c_str(),
        how | O_NONBLOCK | O_CLOEXEC,
        kAnybody));
  }

  FileContent read(const std::string& name, size_t most = kAllBytes) const {
    return read_file(descriptor_.number(), name, most);
  }

  /// Whether there is anything of that name.
  bool has(const std::string& name) const {
    struct stat found {};
    return ::fstatat(
               descriptor_.number(),
               name.c_str(),
               &found,
               AT_SYMLINK_NOFOLLOW) == 0;
  }

  /// Throws:   Error if something else than a file has that name.
  void check_place(const std::string& name) const {
    const auto obstacle = detail::obstacle_at(descriptor_.number(), name);
    if (!obstacle.empty()) {
      detail::stop_on_obstacle(path_ / name, obstacle, flag_);
    }
  }

  /// Throws:   Error if the file is still there then.
  void remove(const std::string& name) const {
    check_place(name);
    if (::unlinkat(descriptor_.number(), name.c_str(), /*flags=*/0) != 0 &&
        errno != ENOENT) {
      stop_on_write(name, last_error());
    }
  }

  /// Over what has the new name.
  std::error_code rename(const std::string& from, const std::string& to) const {
    const int here = descriptor_.number();
    return ::renameat(here, from.c_str(), here, to.c_str()) == 0
        ? std::error_code()
        : last_error();
  }

  /// Gives a file a second name, which nothing has yet.
  std::error_code link(const std::string& from, const std::string& to) const {
    const int here = descriptor_.number();
    return ::linkat(here, from.c_str(), here, to.c_str(), /*flags=*/0) == 0
        ? std::error_code()
        : last_error();
  }

  [[noreturn]] void stop_on_unwritable() const {
    throw support::Error(fmt::format(
        "expected the folder {} to be writable, but no file can be made in it: "
        "{}. Give another {}.",
        path_.string(),
        last_error().message(),
        flag_));
  }

  [[noreturn]] void stop_on_write(const std::string& name, std::error_code why)
      const {
    if (why == std::errc::no_such_file_or_directory) {
      throw support::Error(fmt::format(
          "expected the folder {} to be there until all is written, but it was "
          "deleted. Give the same command again to start anew.",
          path_.string()));
    }
    throw support::Error(fmt::format(
        "expected {} to be writable, but writing it failed: {}. Make room on "
        "the disk, or give another {}.",
        (path_ / name).string(),
        why.message(),
        flag_));
  }

 private:
  static Descriptor made_and_opened(const std::filesystem::path& path) {
    std::error_code not_made;
    std::filesystem::create_directories(path, not_made);
    Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (not_made && !folder.is_open()) {
      errno = not_made.value(); // why, where opening says that there is none
    }
    return folder;
  }

  std::filesystem::path path_;
  std::string flag_;
  Descriptor descriptor_;
};

} // namespace training
