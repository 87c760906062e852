// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

namespace training {

/// What to do about other programs that take the cores of this one, if there
/// are any. Threads of OpenMP wait for each other in loops: where one of them
/// has lost its core, the others burn theirs until it gets it back.
///
/// `load` is how many programs were running on average of the last minute.
inline std::optional<std::string>
hint_on_load(double load, unsigned cores, int threads) {
  constexpr double kIdle = 0.5; // a browser, an editor
  if (threads < 2 || load + threads < cores + kIdle) {
    return std::nullopt;
  }
  return fmt::format(
      "load {:.1f} on {} cores: try OMP_WAIT_POLICY=passive, or fewer --threads",
      load,
      cores);
}

/// Likewise of this machine. Nothing where the policy is set already.
inline std::optional<std::string> hint_on_load(int threads) {
  const char* const policy = std::getenv("OMP_WAIT_POLICY");
  double load = 0; // on average of the last minute
  if (policy != nullptr || ::getloadavg(&load, 1) != 1) {
    return std::nullopt;
  }
  return hint_on_load(load, std::thread::hardware_concurrency(), threads);
}

} // namespace training
