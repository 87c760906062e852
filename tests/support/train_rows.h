// SPDX-License-Identifier: MIT
#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace memcnn_test {

/// The rows that a run prints, without the part that depends on its speed.
inline std::vector<std::string> rows(const std::string& out) {
  std::vector<std::string> found;
  std::istringstream lines(out);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("iteration:", 0) == 0) {
      found.push_back(line.substr(0, line.find(" ms_per_step")));
    }
  }
  return found;
}

} // namespace memcnn_test
