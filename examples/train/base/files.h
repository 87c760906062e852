// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <fmt/format.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace training {

namespace detail {

/// Why the last call of the system failed. Streams say only that one did: set
/// errno to 0 before them.
inline std::error_code last_error() {
  return errno != 0 ? std::error_code(errno, std::generic_category())
                    : std::make_error_code(std::errc::io_error);
}

/// Waits until a file, or the names in a folder, would survive a power cut.
/// Where the system has no such call, the system decides when that is.
inline std::error_code flush_to_disk(const std::filesystem::path& path) {
  std::error_code error;
#if defined(__unix__) || defined(__APPLE__)
  const int file = ::open(path.c_str(), O_RDONLY);
  if (file < 0) {
    return last_error();
  }
  if (::fsync(file) != 0) {
    error = last_error();
  }
  ::close(file);
#endif
  return error;
}

inline std::error_code write_to_disk(
    const std::filesystem::path& path,
    const std::string& bytes) {
  errno = 0;
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  return file ? flush_to_disk(path) : last_error();
}

/// `flag` is the one that names the file, or the folder it is in.
[[noreturn]] inline void stop_on_write(
    const std::filesystem::path& path,
    std::error_code why,
    const std::string& flag = "--results-dir") {
  throw support::Error(fmt::format(
      "expected {} to be writable, but writing it failed: {}. Make room on "
      "the disk, or give another {}.",
      path.string(),
      why.message(),
      flag));
}

} // namespace detail

/// Writes a file so that either the old or the whole new one is there, never a
/// part, whenever the program or the machine stops: fills a file beside it,
/// which then takes its name.
///
/// Throws:   Error if that fails; the old file is then whole, and nothing is
///           left beside it. `flag` is what the user may change.
inline void write_file(
    const std::filesystem::path& path,
    const std::string& bytes,
    const std::string& flag = "--results-dir") {
  const std::filesystem::path partial = path.string() + ".partial";
  std::error_code error = detail::write_to_disk(partial, bytes);
  if (!error) {
    std::filesystem::rename(partial, path, error);
  }
  if (error) {
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    detail::stop_on_write(path, error, flag);
  }
  detail::flush_to_disk(std::filesystem::absolute(path).parent_path());
}

/// Proves before any work is done that write_file() can write a file, and makes
/// the folder that it is to be in.
///
/// Throws:   Error if that fails.
inline void check_writable(
    const std::filesystem::path& path,
    const std::string& flag) {
  const std::filesystem::path partial = path.string() + ".partial";
  std::error_code ignored;
  if (path.has_parent_path()) {
    std::filesystem::create_directories(path.parent_path(), ignored);
  }
  if (std::filesystem::is_directory(path, ignored)) {
    detail::stop_on_write(
        path, std::make_error_code(std::errc::is_a_directory), flag);
  }
  errno = 0;
  if (!std::ofstream(partial, std::ios::binary)) {
    detail::stop_on_write(path, detail::last_error(), flag);
  }
  std::filesystem::remove(partial, ignored);
}

/// The bytes of a file, or nothing where it cannot be read.
inline std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes(
      std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>{});
  return file.is_open() && !file.bad() ? std::optional(bytes) : std::nullopt;
}

inline bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

} // namespace training
