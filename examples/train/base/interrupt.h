// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <csignal>

namespace training {

namespace detail {
inline volatile std::sig_atomic_t received_signal = 0;
inline int output_errno = 0;
} // namespace detail

/// Those that interrupted() may be.
inline constexpr std::array<int, 4> kStopSignals{
    SIGINT,
    SIGTERM,
    SIGHUP,
    SIGPIPE};

/// Makes a file that grows over a limit, and a pipe or connection that nobody
/// reads any more, errors of the write instead of the end of the program.
inline void ignore_signals_of_writes() {
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

/// Makes Ctrl-C, a termination request and a closed terminal wait for the end
/// of the step. A second one ends the program at once.
inline void catch_interrupts() {
  const auto note = [](int signal) {
    detail::received_signal = signal;
    std::signal(signal, SIG_DFL);
  };
  std::signal(SIGINT, note);
  std::signal(SIGTERM, note);
  if (std::signal(SIGHUP, note) == SIG_IGN) {
    std::signal(SIGHUP, SIG_IGN); // as nohup wants it
  }
}

/// Asks the program to stop, as SIGPIPE would: what it prints goes nowhere.
inline void stop_for_lost_output(int error) {
  detail::output_errno = error;
  if (detail::received_signal == 0) {
    detail::received_signal = SIGPIPE;
  }
}

/// The signal that asked this process to stop, or 0.
inline int interrupted() {
  return detail::received_signal;
}

/// Why something could not be printed, as an errno, or 0.
inline int output_error() {
  return detail::output_errno;
}

} // namespace training
