// SPDX-License-Identifier: MIT
#pragma once

#include "support/error.h"

#include <filesystem>
#include <string>
#include <system_error>

#include <unistd.h>

namespace memcnn_test {

/// A file that tests/reference/generate_weights.py wrote.
inline std::string reference(const std::string& name) {
  return std::string(MEMCNN_TEST_DATA_DIR) + "/weights/" + name;
}

/// A name for a file that goes when the test ends.
class TemporaryFile final {
 public:
  TemporaryFile()
      : path_(
            std::filesystem::temp_directory_path() /
            ("memcnn_weights_" + std::to_string(::getpid()) + "_" +
             std::to_string(count++) + ".pt")) {}
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }

  std::string path() const {
    return path_.string();
  }

 private:
  inline static int count = 0;
  std::filesystem::path path_;
};

/// What the action says as it fails.
template <class Action>
std::string message(const Action& action) {
  try {
    action();
  } catch (const support::Error& error) {
    return error.what();
  }
  return "no error";
}

} // namespace memcnn_test
