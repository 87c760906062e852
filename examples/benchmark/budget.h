// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

namespace benchmark {

/// What --budget says: a number of MiB, a percentage of what the plain network
/// holds after forward, or all that it would take.
class Budget {
 public:
  explicit Budget(const std::string& text) {
    if (text == "all") {
      return;
    }
    std::istringstream stream(text);
    double number = 0;
    char percent = '\0';
    const bool is_number = static_cast<bool>(stream >> number) && number >= 0;
    const bool has_unit = static_cast<bool>(stream >> percent);
    const bool is_whole = has_unit
        ? percent == '%' && stream.peek() == EOF && number <= kMostPercent
        : number <= kMostMebibytes;
    if (!is_number || !is_whole) {
      throw support::Error(fmt::format(
          "expected --budget to be from 0 to {:.0f} MiB, from 0% to {:.0f}% of "
          "what plain holds, or all, but got \"{}\". See memcnn_benchmark "
          "--help.",
          kMostMebibytes,
          kMostPercent,
          text));
    }
    (has_unit ? share_ : mebibytes_) = number;
  }

  /// Throws:   Error if it is a share of what is not known.
  int64_t bytes(std::optional<int64_t> held_by_plain) const {
    if (mebibytes_) {
      return static_cast<int64_t>(*mebibytes_ * 1024 * 1024);
    }
    if (!share_) {
      return std::numeric_limits<int64_t>::max();
    }
    if (!held_by_plain) {
      throw support::Error(
          "expected a plain network to take a percentage of, but it failed. "
          "Give --budget in MiB.");
    }
    return static_cast<int64_t>(
        *share_ / 100 * static_cast<double>(*held_by_plain));
  }

 private:
  static constexpr double kMostPercent = 1000;
  static constexpr double kMostMebibytes = 1e9; // a thousandth of int64_t's

  std::optional<double> mebibytes_;
  std::optional<double> share_; // in percent
};

} // namespace benchmark
