// SPDX-License-Identifier: MIT
#pragma once

#include "support/printable.h"
#include "train/base/checksum.h"
#include "train/base/format_error.h"
#include "train/base/program_name.h"

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
  /// 1 was of TorchScript, which can run code; 2 is of torch.save(); 3 knows
  /// of the lengths that a run was meant to have.
  static constexpr int kFormat = 3;
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

inline constexpr size_t kMostSealBytes = 100; // of the first line

/// What the first line says.
struct ParsedSeal {
  size_t line_bytes = 0;
  std::string checksum;
};

/// Parses the first line, out of the first kMostSealBytes of `file_bytes`.
///
/// Throws:   FormatError if there is none, if it is of another version, or of
///           another number of bytes.
inline ParsedSeal parse_seal(const std::string& start, size_t file_bytes) {
  const auto end = start.substr(0, kMostSealBytes).find('\n');
  std::istringstream line(start.substr(0, end));
  std::string magic;
  int format = 0;
  line >> magic >> format;
  if (magic != Seal::kMagic || !line || end == std::string::npos) {
    throw FormatError("it is something else or damaged");
  }
  if (format != Seal::kFormat) {
    throw FormatError(fmt::format(
        "it has format {} instead of {}: the version of {} that wrote it goes on "
        "from it",
        format,
        Seal::kFormat,
        program_name()));
  }
  ParsedSeal seal{end + 1, ""};
  size_t expected = 0;
  line >> expected >> seal.checksum;
  const size_t found = file_bytes - seal.line_bytes;
  if (!line || found != expected) {
    throw FormatError(fmt::format(
        "it has {} bytes instead of {}: it is damaged", found, expected));
  }
  return seal;
}

/// What seal() was given.
///
/// Throws:   FormatError if it is damaged, or of another version.
inline std::string unseal(const std::string& sealed) {
  const ParsedSeal seal = parse_seal(sealed, sealed.size());
  std::string content = sealed.substr(seal.line_bytes);
  const std::string found = checksum_text(checksum(content));
  if (found != seal.checksum) {
    throw FormatError(fmt::format(
        "it has checksum {} instead of {}: it is damaged",
        found,
        support::printable(seal.checksum)));
  }
  return content;
}

} // namespace training
