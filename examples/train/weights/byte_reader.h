// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/format_error.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace training {

/// Takes one value after the other from bytes, never past their end.
///
/// Throws:   FormatError where they end too early.
class ByteReader final {
 public:
  /// `what` the bytes are, such as "its pickle", for the error.
  ByteReader(std::string_view bytes, const char* what)
      : rest_(bytes), what_(what) {}

  bool at_end() const {
    return rest_.empty();
  }

  std::string_view take(uint64_t count) {
    if (count > rest_.size()) {
      stop_on_corruption();
    }
    const auto taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  /// Of up to eight bytes, the low one first.
  uint64_t integer(unsigned count) {
    uint64_t value = 0;
    unsigned shift = 0;
    for (const char byte : take(count)) {
      value |= uint64_t{static_cast<unsigned char>(byte)} << shift;
      shift += 8;
    }
    return value;
  }

  /// Up to the end of the line, which is passed over.
  std::string_view line() {
    const auto end = rest_.find('\n');
    if (end == std::string_view::npos) {
      stop_on_corruption();
    }
    return take(end + 1).substr(0, end);
  }

  [[noreturn]] void stop_on_corruption() const {
    throw FormatError(fmt::format("{} is corrupt", what_));
  }

 private:
  std::string_view rest_;
  const char* what_;
};

} // namespace training
