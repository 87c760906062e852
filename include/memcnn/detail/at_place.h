// SPDX-License-Identifier: MIT
#pragma once

#include <c10/util/Exception.h>

#include <string>

namespace memcnn::detail {

/// Runs what happens at a place. A c10::Error says where it was, unless it does
/// so already; other exceptions cannot be told, and pass as they are. `place`
/// gives the words, which take longer than many a run.
template <class Place, class Fn>
auto at_place(const Place& place, const Fn& fn) {
  try {
    return fn();
  } catch (c10::Error& error) {
    const std::string words = place();
    const std::string said = error.what_without_backtrace();
    if (said.find(words) == std::string::npos) {
      error.add_context(words);
    }
    throw;
  }
}

} // namespace memcnn::detail
