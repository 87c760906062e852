// SPDX-License-Identifier: MIT
#pragma once

#include <fmt/format.h>
#include <zlib.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace training {

/// Tells whether bytes are still the same, by their CRC-32: against disks and
/// mistakes, not against an adversary. With the checksum of what is `before`
/// them, that of both.
inline uint32_t checksum(const void* bytes, size_t count, uint32_t before = 0) {
  return static_cast<uint32_t>(
      crc32_z(before, static_cast<const Bytef*>(bytes), count));
}

inline uint32_t checksum(const std::string& bytes, uint32_t before = 0) {
  return checksum(bytes.data(), bytes.size(), before);
}

/// As files and messages have it: eight hexadecimal digits.
inline std::string checksum_text(uint32_t checksum) {
  return fmt::format("{:08x}", checksum);
}

} // namespace training
