// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"
#include "train/base/checksum.h"
#include "train/base/format_error.h"

#include <fmt/format.h>

#include <cstddef>
#include <sstream>
#include <string>

namespace training {

/// A checkpoint begins with a line that says what the rest must be,
/// `memcnn-checkpoint <format> <bytes> <checksum>`, so that a damaged one is
/// known for what it is before anything is made of it.
struct Seal final {
  static constexpr const char* kMagic = "memcnn-checkpoint";
  /// 1 was of TorchScript, which can run code; 2 is of torch.save().
  static constexpr int kFormat = 2;
};

inline std::string seal(const std::string& content) {
  return fmt::format(
             "{} {} {} {}\n",
             Seal::kMagic,
             Seal::kFormat,
             content.size(),
             checksum_text(checksum(content))) +
      content;
}

/// What seal() was given.
///
/// Throws:   FormatError if it is damaged, or of another version.
inline std::string unseal(const std::string& sealed) {
  constexpr size_t kMostBytes = 100; // of the line
  const auto end = sealed.substr(0, kMostBytes).find('\n');
  std::istringstream line(sealed.substr(0, end));
  std::string magic;
  int format = 0;
  line >> magic >> format;
  if (magic != Seal::kMagic || !line || end == std::string::npos) {
    throw FormatError("it is something else or damaged");
  }
  if (format != Seal::kFormat) {
    throw FormatError(fmt::format(
        "it has format {} instead of {}: the version of memcnn_train that "
        "wrote it goes on from it",
        format,
        Seal::kFormat));
  }
  size_t size = 0;
  std::string sum;
  line >> size >> sum;
  std::string content = sealed.substr(end + 1);
  const std::string found = checksum_text(checksum(content));
  if (!line || content.size() != size || found != sum) {
    throw FormatError(fmt::format(
        "it has {} bytes with checksum {} instead of {} with {}: it is damaged",
        content.size(),
        found,
        size,
        support::printable(sum)));
  }
  return content;
}

} // namespace training
