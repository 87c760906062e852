// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"
#include "train/base/program_name.h"
#include "train/team/launcher.h"
#include "train/team/team.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

namespace training {

namespace detail {

/// Whether another process says what all of them meet. Before they know of each
/// other, one of each machine does: that one alone may have another command.
inline bool is_said_elsewhere(const Team* team) {
  return team != nullptr ? !team->leads()
                         : launcher_number("LOCAL_RANK", 0) > 0;
}

/// What an error says on the terminal of a process: nothing where that of
/// another says it.
inline std::string
last_words(const Team* team, int64_t rank, const std::exception& error) {
  if (is_said_elsewhere(team) &&
      dynamic_cast<const SharedError*>(&error) != nullptr) {
    return "";
  }
  const std::string message = support::message_of(error);
  if (team == nullptr || !team->is_of_lost_process(error)) {
    return fmt::format(
        "{}: {}{}\n",
        program_name(),
        rank > 0 ? fmt::format("rank {}: ", rank) : "",
        message);
  }
  return rank > 0
      ? ""
      : fmt::format(
            "{}: expected the other processes to go on, but one of them has "
            "ended or does not answer ({}). See what it or torchrun has "
            "printed. The same command goes on from the last checkpoint.\n",
            program_name(),
            message.substr(0, message.find('\n')));
}

} // namespace detail

/// Ends a process that an error has stopped: `team` is what it is in, or none.
///
/// At once where others wait for it: their calls fail as its connections close,
/// while destructors would wait for calls that nobody answers.
inline int leave(const Team* team, const std::exception& error) {
  const int64_t rank =
      team != nullptr ? team->rank() : launcher_number("RANK", 0);
  std::fputs(detail::last_words(team, rank, error).c_str(), stderr);
  if (team != nullptr && team->size() > 1) {
    std::fflush(nullptr);
    std::_Exit(EXIT_FAILURE);
  }
  return EXIT_FAILURE;
}

} // namespace training
