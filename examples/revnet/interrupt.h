// SPDX-License-Identifier: MIT
#pragma once

#include <csignal>

namespace training {

namespace detail {
inline volatile std::sig_atomic_t received_signal = 0;
} // namespace detail

/// Makes Ctrl-C and a termination request wait for the end of the step. A
/// second one ends the program at once.
inline void catch_interrupts() {
  const auto note = [](int signal) {
    detail::received_signal = signal;
    std::signal(signal, SIG_DFL);
  };
  std::signal(SIGINT, note);
  std::signal(SIGTERM, note);
}

/// The signal that asked the program to stop, or 0.
inline int interrupted() {
  return detail::received_signal;
}

} // namespace training
