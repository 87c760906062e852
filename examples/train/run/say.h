// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/interrupt.h"
#include "train/base/program_name.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <utility>

namespace training {

/// Prints a line, or several, at once: readers of a running run see whole ones.
///
/// Where that fails, the program is asked to stop. Not by fmt::print(), which
/// throws then: a run would end without a checkpoint.
template <class... Args>
void say(fmt::format_string<Args...> pattern, Args&&... args) {
  const auto text = fmt::format(pattern, std::forward<Args>(args)...);
  if (std::puts(text.c_str()) < 0 || std::fflush(stdout) != 0) {
    stop_for_lost_output(errno);
  }
}

inline void print_warning(const std::string& text) {
  std::fputs(
      fmt::format("{}: warning: {}\n", program_name(), text).c_str(), stderr);
}

} // namespace training
