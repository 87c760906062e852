// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace training {

/// A line on the terminal that says what is going on, and goes when there is
/// something to keep. Nothing where stderr is no terminal.
class ProgressLine final {
 public:
  void show(const std::string& text) {
    if (!on_) {
      return;
    }
    std::fputs((kToEmptyLine + text).c_str(), stderr);
    std::fflush(stderr);
    shown_ = true;
  }

  void clear() {
    if (shown_) {
      std::fputs(kToEmptyLine.c_str(), stderr);
      std::fflush(stderr);
      shown_ = false;
    }
  }

  /// Of several processes on one terminal, one is to show it.
  explicit ProgressLine(bool wanted = true) : on_(wanted && is_terminal()) {}

  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  ~ProgressLine() {
    clear();
  }

 private:
  inline static const std::string kToEmptyLine = "\r\033[K";

  static bool is_terminal() {
#if defined(__unix__) || defined(__APPLE__)
    return isatty(STDERR_FILENO) != 0;
#else
    return false;
#endif
  }

  bool on_;
  bool shown_ = false;
};

/// Time that the rest of a run takes, as "3 h 12 min", "12 min" or "40 s".
inline std::string remaining_time(double milliseconds) {
  const auto seconds = static_cast<int64_t>(milliseconds / 1000);
  if (seconds < 100) {
    return fmt::format("{} s", seconds);
  }
  const int64_t minutes = (seconds + 30) / 60;
  return minutes < 100 ? fmt::format("{} min", minutes)
                       : fmt::format("{} h {} min", minutes / 60, minutes % 60);
}

} // namespace training
