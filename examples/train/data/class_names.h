// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"
#include "train/base/file_bytes.h"

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

namespace training {

/// The names of a data set's classes by their numbers, out of a file with a
/// name a line, as the published archives have one. Empty where there is none,
/// or one of other classes: names are for people, and no step needs them.
inline std::vector<std::string> read_class_names(
    const std::filesystem::path& path,
    int64_t num_classes) {
  constexpr size_t kMostBytes = 1 << 16;
  std::istringstream words(read_file(AT_FDCWD, path, kMostBytes).bytes);
  std::vector<std::string> names;
  for (std::string word; words >> word;) {
    names.push_back(support::printable(word));
  }
  return static_cast<int64_t>(names.size()) == num_classes
      ? names
      : std::vector<std::string>();
}

} // namespace training
