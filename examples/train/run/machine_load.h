// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <istream>
#include <optional>
#include <string>
#include <thread>

namespace training {

/// How many threads of other programs want a core, by the text of Linux's
/// /proc/loadavg: on average of the last minute, but no more than right now, so
/// that a run that has just ended does not count.
inline std::optional<double> load_of_others(std::istream&& loadavg) {
  double of_one_minute = 0;
  double of_five = 0;
  double of_fifteen = 0;
  int running = 0; // with this program
  if (!(loadavg >> of_one_minute >> of_five >> of_fifteen >> running)) {
    return std::nullopt;
  }
  return std::min<double>(of_one_minute, running - 1);
}

/// What to do where other programs take cores of this one. Threads of OpenMP
/// wait for each other in loops: where one has lost its core, the others burn
/// theirs until it gets it back.
inline std::optional<std::string>
hint_on_load(double load, unsigned cores, int threads) {
  constexpr double kIdle = 0.5; // a browser, an editor
  if (threads < 2 || load + threads < cores + kIdle) {
    return std::nullopt;
  }
  return fmt::format(
      "load {:.1f} of other programs on {} cores: try OMP_WAIT_POLICY=passive, "
      "or fewer --threads",
      load,
      cores);
}

/// Likewise on this machine, as far as can be told. Nothing where the policy is
/// set already.
inline std::optional<std::string> hint_on_load(int threads) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr) {
    return std::nullopt;
  }
  const auto load = load_of_others(std::ifstream("/proc/loadavg"));
  return load
      ? hint_on_load(*load, std::thread::hardware_concurrency(), threads)
      : std::nullopt;
}

} // namespace training
