// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>
#include <zlib.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace training {

/// Tells whether bytes are still the same, by their CRC-32: against disks and
/// mistakes, not against an adversary. With the checksum of what is `before`
/// them, that of both.
inline uint32_t checksum(std::string_view bytes, uint32_t before = 0) {
  return static_cast<uint32_t>(crc32_z(
      before, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

/// As files and messages have it: eight hexadecimal digits.
inline std::string checksum_text(uint32_t checksum) {
  return fmt::format("{:08x}", checksum);
}

} // namespace training
