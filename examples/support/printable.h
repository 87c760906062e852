// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <iterator>
#include <string>
#include <string_view>

namespace support {

/// Text of a file as a message may show it. A terminal obeys what it is sent:
/// all but printable ASCII is written as \x1b is, and so is the backslash, so
/// that no two texts look alike. What is too long to be read is cut.
inline std::string printable(std::string_view text, size_t most_bytes = 80) {
  std::string shown;
  for (const char byte : text.substr(0, most_bytes)) {
    if (byte >= ' ' && byte <= '~' && byte != '\\') {
      shown += byte;
    } else {
      fmt::format_to(
          std::back_inserter(shown),
          "\\x{:02x}",
          static_cast<unsigned char>(byte));
    }
  }
  return text.size() > most_bytes ? shown + "..." : shown;
}

} // namespace support
