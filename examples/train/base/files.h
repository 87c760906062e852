// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <cerrno>
#include <cstring>
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

/// Waits until a file, or the names in a folder, would survive a power cut.
/// Where the system has no such call, the system decides when that is.
inline bool flush_to_disk(const std::filesystem::path& path) {
#if defined(__unix__) || defined(__APPLE__)
  const int file = ::open(path.c_str(), O_RDONLY);
  if (file < 0) {
    return false;
  }
  const bool flushed = ::fsync(file) == 0;
  const int why = errno;
  ::close(file);
  errno = why;
  return flushed;
#else
  return true;
#endif
}

/// `flag` is the one that names the file, or the folder it is in.
[[noreturn]] inline void stop_on_write(
    const std::filesystem::path& path,
    const std::string& flag = "--results-dir") {
  const std::string why = errno != 0 ? std::strerror(errno) : "unknown reason";
  throw support::Error(
      "expected " + path.string() + " to be writable, but writing it failed: " +
      why + ". Make room on the disk, or give another " + flag + ".");
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
  errno = 0;
  std::ofstream file(partial, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  std::error_code error;
  bool written = file.good() && detail::flush_to_disk(partial);
  if (written) {
    std::filesystem::rename(partial, path, error);
    written = !error;
    errno = error.value();
  }
  if (!written) {
    const int why = errno;
    std::filesystem::remove(partial, error);
    errno = why;
    detail::stop_on_write(path, flag);
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
  std::error_code error;
  if (path.has_parent_path()) {
    std::filesystem::create_directories(path.parent_path(), error);
  }
  errno = std::filesystem::is_directory(path, error) ? EISDIR : 0;
  if (errno != 0 || !std::ofstream(partial, std::ios::binary)) {
    detail::stop_on_write(path, flag);
  }
  std::filesystem::remove(partial, error);
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
