// SPDX-License-Identifier: MIT
#pragma once

#include "process.h"
#include "program.h"
#include "ranks.h"

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace memcnn_test {

/// The processes of one program, each a rank in an environment like that which
/// torchrun makes.
class ProgramRanks final {
 public:
  /// Changes what a process is to be before it becomes the program.
  using Setup = std::function<void(int rank, Process::Arguments& argv)>;

  /// Starts them in a folder, in which out.<rank> and err.<rank> are what they
  /// print. The last `absent` of them never come.
  ProgramRanks(
      int size,
      const std::filesystem::path& directory,
      const Process::Arguments& argv,
      const Setup& setup = {},
      int absent = 0) {
    const int port = free_port();
    for (int rank = 0; rank + absent < size; ++rank) {
      processes_.emplace_back(
          directory, std::to_string(rank), argv, [&](Process::Arguments& own) {
            set_environment(rank, size, port);
            if (setup) {
              setup(rank, own);
            }
          });
    }
  }

  Process& operator[](int rank) {
    return processes_.at(static_cast<size_t>(rank));
  }

  /// What each had to say, by rank; the exit code of one that a signal ended is
  /// -1.
  std::vector<Result> wait(
      std::chrono::seconds most = std::chrono::seconds(60)) {
    const auto end = std::chrono::steady_clock::now() + most;
    std::vector<Result> results;
    for (Process& process : processes_) {
      results.push_back(process.wait(end));
    }
    return results;
  }

 private:
  static void set_environment(int rank, int size, int port) {
    const auto set = [](const char* name, const std::string& value) {
      ::setenv(name, value.c_str(), /*overwrite=*/1);
    };
    set("RANK", std::to_string(rank));
    set("LOCAL_RANK", std::to_string(rank));
    set("WORLD_SIZE", std::to_string(size));
    set("LOCAL_WORLD_SIZE", std::to_string(size));
    set("MASTER_ADDR", "127.0.0.1");
    set("MASTER_PORT", std::to_string(port));
    set("OMP_NUM_THREADS", "1");
  }

  std::vector<Process> processes_;
};

} // namespace memcnn_test
