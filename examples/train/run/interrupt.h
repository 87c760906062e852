// SPDX-License-Identifier: MIT
#pragma once

#include <csignal>

namespace training {

namespace detail {
inline volatile std::sig_atomic_t received_signal = 0;
} // namespace detail

/// Makes Ctrl-C, a termination request and a closed terminal wait for the end
/// of the step. A second one ends the program at once.
inline void catch_interrupts() {
  const auto note = [](int signal) {
    detail::received_signal = signal;
    std::signal(signal, SIG_DFL);
  };
  std::signal(SIGINT, note);
  std::signal(SIGTERM, note);
#ifdef SIGHUP
  if (std::signal(SIGHUP, note) == SIG_IGN) {
    std::signal(SIGHUP, SIG_IGN); // as nohup wants it
  }
#endif
#ifdef SIGXFSZ
  // A file that grows over a limit is then an error of the write, with a
  // message and the old file whole, instead of the end of the program.
  std::signal(SIGXFSZ, SIG_IGN);
#endif
}

/// The signal that asked the program to stop, or 0.
inline int interrupted() {
  return detail::received_signal;
}

} // namespace training
