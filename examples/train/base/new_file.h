// SPDX-License-Identifier: MIT
#pragma once

#include "train/base/file_bytes.h"
#include "train/base/folder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace training {

/// Behind the name of a file that is not whole yet. Nobody else's files are
/// called so: one that is there is of a program that was killed.
inline constexpr const char* kPartialSuffix = ".memcnn-partial";

/// A file that is whole and on the disk before it takes the name of another, so
/// that whenever the program or the machine stops, the old or the whole new one
/// has that name. Until then it is beside it, and goes at the end of scope.
class NewFile final {
 public:
  /// Throws:   Error if it cannot be written, or something else than a file is
  ///           in its way; nothing is left of it then.
  NewFile(const Folder& folder, std::string name, std::string_view bytes)
      : folder_(folder),
        name_(std::move(name)),
        partial_(name_ + kPartialSuffix) {
    folder_.check_place(name_);
    folder_.remove(partial_);
    if (const auto error = write(bytes)) {
      discard();
      folder_.stop_on_write(name_, error);
    }
  }

  ~NewFile() {
    discard();
  }

  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  /// Throws:   Error if that fails; the old file then still has the name.
  void take_name() {
    if (const auto error = folder_.rename(partial_, name_)) {
      folder_.stop_on_write(name_, error);
    }
    flush_to_disk(folder_.descriptor().number());
  }

 private:
  /// Into a file that is nobody else's, and not behind a link.
  std::error_code write(std::string_view bytes) const {
    const Descriptor file = folder_.open(partial_, O_WRONLY | O_CREAT | O_EXCL);
    if (!file.is_open()) {
      return last_error();
    }
    // Who may read the old one may read the new one, and nobody else.
    struct stat old {};
    if (::fstatat(
            folder_.descriptor().number(), name_.c_str(), &old, /*flags=*/0) ==
        0) {
      ::fchmod(file.number(), old.st_mode);
    }
    const auto error = write_all(file.number(), bytes);
    return error ? error : flush_to_disk(file.number());
  }

  void discard() const {
    ::unlinkat(folder_.descriptor().number(), partial_.c_str(), /*flags=*/0);
  }

  const Folder& folder_;
  std::string name_;
  std::string partial_;
};

/// Writes a file of a folder: the old or the whole new one is there, always.
///
/// Throws:   Error if that fails; the old file is then whole.
inline void replace_file(
    const Folder& folder,
    const std::string& name,
    std::string_view bytes) {
  NewFile(folder, name, bytes).take_name();
}

} // namespace training
