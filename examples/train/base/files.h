// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/folder.h"
#include "train/base/new_file.h"

#include <fcntl.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

// Files at paths that users give, which may lead anywhere.

namespace training {

namespace detail {

/// The file behind a link, or a chain of them; there may be none yet.
inline std::filesystem::path behind_links(std::filesystem::path path) {
  constexpr int kMost = 40; // as in Linux
  for (int links = 0; links < kMost; ++links) {
    std::error_code no_link;
    const auto target = std::filesystem::read_symlink(path, no_link);
    if (no_link) {
      break;
    }
    path = path.parent_path() / target; // the target alone, if it is absolute
  }
  return path;
}

/// A path that leads to a file, or to where one can be.
inline std::filesystem::path place_at(
    const std::filesystem::path& path,
    const std::string& flag) {
  // Of the path as it is: links of /proc, such as /dev/stdout, lead elsewhere
  // than they say.
  const auto obstacle =
      path.has_filename() ? obstacle_at(AT_FDCWD, path) : "a directory";
  if (!obstacle.empty()) {
    stop_on_obstacle(path, obstacle, flag);
  }
  const auto place = behind_links(path);
  std::error_code error;
  if (std::filesystem::is_symlink(place, error)) {
    stop_on_obstacle(path, "a link to itself", flag);
  }
  return place;
}

inline Folder folder_of(
    const std::filesystem::path& place,
    const std::string& flag) {
  return {place.has_parent_path() ? place.parent_path() : ".", flag};
}

} // namespace detail

/// Whether two paths lead to one file, or would once there is one.
inline bool is_same_file(
    const std::filesystem::path& one,
    const std::filesystem::path& other) {
  std::error_code error;
  if (std::filesystem::equivalent(one, other, error)) {
    return true;
  }
  const auto place = [&](const std::filesystem::path& path) {
    return std::filesystem::weakly_canonical(
        std::filesystem::absolute(detail::behind_links(path)), error);
  };
  const auto first = place(one);
  return !first.empty() && first == place(other);
}

/// Writes a file so that the old or the whole new one is there, always. A link
/// to it stays one. `flag` is what the user may change.
///
/// Throws:   Error if that fails; the old file is then whole.
inline void write_file(
    const std::filesystem::path& path,
    std::string_view bytes,
    const std::string& flag) {
  const auto place = detail::place_at(path, flag);
  replace_file(detail::folder_of(place, flag), place.filename(), bytes);
}

/// Proves before any work is done that write_file() can write a file, and makes
/// the folder that it is to be in.
///
/// Throws:   Error if that fails.
inline void check_writable(
    const std::filesystem::path& path,
    const std::string& flag) {
  const auto place = detail::place_at(path, flag);
  NewFile(detail::folder_of(place, flag), place.filename(), /*bytes=*/"");
}

} // namespace training
