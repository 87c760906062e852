// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <sys/wait.h>
#include <unistd.h>

namespace memcnn_test {

inline std::string read(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

inline void write(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// What a program has to say.
struct Result {
  int exit_code = 0; // -1 where a signal ended it
  std::string out;
  std::string err;
};

/// Runs programs as their users do, in a folder that goes with the test.
class ProgramTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = std::filesystem::temp_directory_path() /
        ("memcnn_" + std::string(test->name()) + "_" +
         std::to_string(::getpid()));
    std::filesystem::create_directories(directory_);
  }

  void TearDown() override {
    // Not remove_all(): LibTorch has one of that name, which crashes.
    EXPECT_EQ(std::system(("rm -rf '" + directory_.string() + "'").c_str()), 0);
  }

  /// A command of the shell, in the folder of the test.
  Result shell(const std::string& command) {
    const auto out = directory_ / "out";
    const auto err = directory_ / "err";
    const std::string line = "cd '" + directory_.string() + "' && { " +
        command + "; } > '" + out.string() + "' 2> '" + err.string() + "'";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(out), read(err)};
  }

  std::filesystem::path directory_;
};

} // namespace memcnn_test
