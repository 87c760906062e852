// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include <unistd.h>

namespace fuzz {

/// A file for readers that ask for a path; the next of this process has its name.
class InputFile final {
 public:
  explicit InputFile(const std::string& bytes)
      : path_(
            std::filesystem::temp_directory_path() /
            ("memcnn_fuzz_" + std::to_string(::getpid()))) {
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile() {
    std::filesystem::remove(path_);
  }

  const std::filesystem::path& path() const {
    return path_;
  }

 private:
  std::filesystem::path path_;
};

} // namespace fuzz
