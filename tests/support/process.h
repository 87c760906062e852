// SPDX-License-Identifier: MIT
#pragma once

#include "program.h"

#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace memcnn_test {

/// A program that runs beside the test, in a folder in which out.<name> and
/// err.<name> are what it prints. It does not outlive the object.
class Process final {
 public:
  using Arguments = std::vector<std::string>;
  /// What happens in the new process before it becomes the program.
  using Setup = std::function<void(Arguments& argv)>;

  Process(
      const std::filesystem::path& directory,
      const std::string& name,
      const Arguments& argv,
      const Setup& setup = {})
      : out_(directory / ("out." + name)), err_(directory / ("err." + name)) {
    std::filesystem::remove(out_); // of one before
    std::filesystem::remove(err_);
    pid_ = ::fork();
    if (pid_ == 0) {
      become(directory, argv, setup);
    }
  }

  Process(Process&& other) noexcept
      : out_(std::move(other.out_)),
        err_(std::move(other.err_)),
        pid_(std::exchange(other.pid_, 0)) {}

  Process& operator=(Process&&) = delete;

  ~Process() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }

  void signal(int signal) const {
    ::kill(pid_, signal);
  }

  /// What it has printed by now.
  std::string out() const {
    return read(out_);
  }

  bool has_ended() {
    if (pid_ > 0 && ::waitpid(pid_, &status_, WNOHANG) == pid_) {
      pid_ = 0;
    }
    return pid_ == 0;
  }

  /// What it has to say, once it has ended. One that does not is killed.
  Result wait(std::chrono::steady_clock::time_point end) {
    while (!has_ended()) {
      if (std::chrono::steady_clock::now() > end) {
        ADD_FAILURE() << out_ << " is of a program that does not end";
        signal(SIGKILL);
        end = std::chrono::steady_clock::time_point::max();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return {
        WIFEXITED(status_) ? WEXITSTATUS(status_) : -1, read(out_), read(err_)};
  }

 private:
  [[noreturn]] void become(
      const std::filesystem::path& directory,
      Arguments argv,
      const Setup& setup) const {
    constexpr int kHow = O_WRONLY | O_CREAT | O_TRUNC;
    ::dup2(::open(out_.c_str(), kHow, 0666), STDOUT_FILENO);
    ::dup2(::open(err_.c_str(), kHow, 0666), STDERR_FILENO);
    if (setup) {
      setup(argv);
    }
    std::vector<char*> words;
    for (std::string& word : argv) {
      words.push_back(word.data());
    }
    words.push_back(nullptr);
    if (::chdir(directory.c_str()) == 0) {
      ::execv(words[0], words.data());
    }
    ::_exit(127);
  }

  std::filesystem::path out_;
  std::filesystem::path err_;
  pid_t pid_ = 0; // 0 once it has ended
  int status_ = 0;
};

} // namespace memcnn_test
