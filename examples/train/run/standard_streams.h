// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>

namespace training {

/// Gives stdin, stdout and stderr somewhere to go where the program was started
/// without: else the next file that is opened gets the number of a closed one,
/// and what is printed lands in it. Call this first thing in main().
inline void open_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    const bool closed = ::fcntl(stream, F_GETFD) < 0;
    // Of the free numbers the system takes the lowest.
    if (closed && ::open("/dev/null", O_RDWR) != stream) {
      std::_Exit(EXIT_FAILURE); // and nowhere to say why
    }
  }
}

} // namespace training
