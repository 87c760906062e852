// SPDX-License-Identifier: MIT
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <system_error>

namespace training {

/// A number that torchrun, or who starts processes in its place, has put into
/// the environment; `otherwise` where there is none.
inline int64_t launcher_number(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  const std::string text = value != nullptr ? value : "";
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  return error == std::errc() && rest == end ? number : otherwise;
}

/// How many processes of the run share the cores of this machine.
inline int64_t processes_of_this_machine() {
  return launcher_number("LOCAL_WORLD_SIZE", launcher_number("WORLD_SIZE", 1));
}

} // namespace training
