// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"
#include "train/base/file_bytes.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace training {

/// The names of a data set's classes by their numbers.
struct ClassNames {
  std::vector<std::string> names; // empty where they are not known
  std::string flaw; // of the file, where it has one
};

/// Reads a file with a name a line, as the published archives have one. A file
/// that is missing or flawed stops nothing: names are for people, and no step
/// needs them.
inline ClassNames read_class_names(
    const std::filesystem::path& path,
    int64_t num_classes) {
  constexpr size_t kMostBytes = 1 << 16;
  std::istringstream words(read_file(AT_FDCWD, path, kMostBytes).bytes);
  std::vector<std::string> names;
  for (std::string word; words >> word;) {
    names.push_back(support::printable(word));
  }
  const std::set<std::string> different(names.begin(), names.end());
  const auto count = static_cast<int64_t>(different.size());
  if (names.empty() ||
      (count == num_classes && names.size() == different.size())) {
    return {names, ""};
  }
  return {
      {},
      fmt::format(
          "expected {} to have {} different names, but it has {}, {} of them "
          "different: classes go by their numbers",
          path.string(),
          num_classes,
          names.size(),
          count)};
}

} // namespace training
