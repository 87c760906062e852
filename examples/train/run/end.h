// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/interrupt.h"
#include "train/base/program_name.h"
#include "train/base/run_settings.h"
#include "train/run/run_state.h"
#include "train/run/say.h"

#include <fmt/format.h>

#include <cstdio>
#include <string>
#include <system_error>

namespace training {

namespace detail {

/// How a run that was stopped goes on: with these flags it would not do so from
/// its last checkpoint.
inline std::string how_to_go_on(const RunSettings& settings) {
  return fmt::format(
      "the same command without {} goes on from there",
      settings.from_previous ? "--from-previous" : "--fresh");
}

/// What a run says that could not print all of it; stderr may still be read.
inline void print_lost_output(
    const RunSettings& settings,
    const RunState& state,
    bool finished) {
  std::fputs(
      fmt::format(
          "{}: expected stdout to be writable, but writing it failed: {}. {}\n",
          program_name(),
          std::generic_category().message(output_error()),
          finished ? "The run is done, and all its files are written."
                   : fmt::format(
                         "The run stopped at iteration {}; {}.",
                         state.iteration,
                         how_to_go_on(settings)))
          .c_str(),
      stderr);
}

} // namespace detail

/// What the leader prints last. Returns the exit code.
inline int end(
    const RunSettings& settings,
    const RunState& state,
    int stop_signal,
    bool finished) {
  if (output_error() != 0) {
    detail::print_lost_output(settings, state, finished);
    return 128 + (stop_signal != 0 ? stop_signal : interrupted());
  }
  if (!finished) {
    say("stopped at iteration {}; {}",
        state.iteration,
        detail::how_to_go_on(settings));
    return 128 + stop_signal;
  }
  return 0;
}

} // namespace training
