// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace benchmark::detail {

/// One cell a column; of what failed its name and its error alone.
using Row = std::vector<std::string>;

inline std::string fixed(std::optional<double> value, int digits) {
  return value ? fmt::format("{:.{}f}", *value, digits) : "-";
}

inline std::string scientific(std::optional<double> value) {
  return value ? fmt::format("{:.1e}", *value) : "-";
}

inline double mebibytes(int64_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

/// The first column to the left, the others to the right; an error is no part
/// of a column.
inline void print_rows(const std::vector<Row>& rows) {
  std::vector<size_t> widths(rows.front().size(), 0);
  for (const Row& row : rows) {
    const bool complete = row.size() == widths.size();
    for (size_t i = 0; i < (complete ? row.size() : 1); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  for (const Row& row : rows) {
    const bool complete = row.size() == widths.size();
    fmt::print("{:<{}}", row[0], widths[0]);
    for (size_t i = 1; i < row.size(); ++i) {
      fmt::print("  {:>{}}", row[i], complete ? widths[i] : 0);
    }
    fmt::print("\n");
  }
}

} // namespace benchmark::detail
