// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>
#include <memcnn/version.h>

#include <string>

namespace support {

/// That of memcnn, as "1.2.3".
inline std::string version() {
  return fmt::format(
      "{}.{}.{}",
      MEMCNN_VERSION_MAJOR,
      MEMCNN_VERSION_MINOR,
      MEMCNN_VERSION_PATCH);
}

} // namespace support
