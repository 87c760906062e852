// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

namespace training {

/// Tells whether bytes are still the same: against disks and mistakes, not
/// against an adversary.
///
/// Source:   Fowler, Noll, Vo, "The FNV Non-Cryptographic Hash Algorithm",
///           FNV-1a with 64 bits.
class Checksum {
 public:
  Checksum& add(const void* bytes, size_t count) {
    const auto* first = static_cast<const unsigned char*>(bytes);
    for (size_t i = 0; i < count; ++i) {
      value_ = (value_ ^ first[i]) * 0x100000001b3u;
    }
    return *this;
  }

  /// As 16 hexadecimal digits.
  std::string text() const {
    char digits[17];
    std::snprintf(
        digits,
        sizeof digits,
        "%016llx",
        static_cast<unsigned long long>(value_));
    return digits;
  }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

inline std::string checksum(const std::string& bytes) {
  return Checksum().add(bytes.data(), bytes.size()).text();
}

} // namespace training
