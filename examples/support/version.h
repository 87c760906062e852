// SPDX-License-Identifier: MIT
#pragma once

#include <memcnn/version.h>

#include <string>

namespace support {

/// That of memcnn, as "1.2.3".
inline std::string version() {
  return std::to_string(MEMCNN_VERSION_MAJOR) + "." +
      std::to_string(MEMCNN_VERSION_MINOR) + "." +
      std::to_string(MEMCNN_VERSION_PATCH);
}

} // namespace support
