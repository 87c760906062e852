// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/descriptor.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>

// Bytes from and to descriptors: whole, or with the system's reason why not.

namespace training {

/// Why the last call of the system failed.
inline std::error_code last_error() {
  return {errno, std::generic_category()};
}

/// What stands where a file is to be, if it is something else: reading and
/// writing it could wait for ever, and to replace it could break the machine.
/// Empty for a file, and for what the system refuses to say more of.
inline std::string other_than_file(const struct stat& found) {
  return S_ISREG(found.st_mode) ? ""
      : S_ISDIR(found.st_mode)  ? "a directory"
      : S_ISFIFO(found.st_mode) ? "a pipe"
      : S_ISSOCK(found.st_mode) ? "a socket"
                                : "a device";
}

/// What a file has, or in words why that cannot be read.
struct FileContent {
  std::string bytes;
  std::string problem; // empty where there is none
  size_t file_bytes = 0; // also where not all of them are read
};

inline constexpr size_t kAllBytes = std::numeric_limits<size_t>::max();

/// Reads a file of a folder, or of AT_FDCWD, or its first bytes. Never waits for
/// another program.
inline FileContent
read_file(int folder, const std::string& name, size_t most = kAllBytes) {
  const Descriptor file(
      ::openat(folder, name.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  struct stat found {};
  if (!file.is_open() || ::fstat(file.number(), &found) != 0) {
    return {"", last_error().message(), 0};
  }
  if (const auto other = other_than_file(found); !other.empty()) {
    return {"", "it is " + other, 0};
  }
  FileContent content;
  content.file_bytes = static_cast<size_t>(found.st_size);
  std::array<char, 65536> part;
  for (;;) {
    const size_t wanted = std::min(part.size(), most - content.bytes.size());
    const auto count = ::read(file.number(), part.data(), wanted);
    if (count == 0) {
      return content;
    }
    if (count > 0) {
      content.bytes.append(part.data(), static_cast<size_t>(count));
    } else if (errno != EINTR) {
      return {"", last_error().message(), 0};
    }
  }
}

inline std::error_code write_all(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const auto count = ::write(file, bytes.data(), bytes.size());
    if (count >= 0) {
      bytes.remove_prefix(static_cast<size_t>(count));
    } else if (errno != EINTR) {
      return last_error();
    }
  }
  return {};
}

/// Waits until a file, or the names in a folder, would survive a power cut.
inline std::error_code flush_to_disk(int descriptor) {
  return ::fsync(descriptor) == 0 ? std::error_code() : last_error();
}

} // namespace training
