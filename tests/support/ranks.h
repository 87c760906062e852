// SPDX-License-Identifier: MIT
#pragma once

// Processes that a test starts as torchrun would.

#include "support/program.h"

#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace memcnn_test {

using namespace std::chrono_literals;

/// A port that nobody listens on.
inline int free_port() {
  const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* plain = reinterpret_cast<sockaddr*>(&address);
  const bool found = ::bind(socket, plain, size) == 0 &&
      ::getsockname(socket, plain, &size) == 0;
  ::close(socket);
  return found ? ntohs(address.sin_port) : 0;
}

/// A child of this process that runs a function, or has run it.
///
/// A copy of this process, which spares it the loading of LibTorch: so the test
/// itself must not have used CUDA or threads.
class Child {
 public:
  Child(
      const std::map<std::string, std::string>& environment,
      const std::function<void()>& body)
      : output_(
            std::filesystem::temp_directory_path() /
            ("memcnn_child_" + std::to_string(::getpid()) + "_" +
             std::to_string(++count()))),
        process_(::fork()) {
    if (process_ == 0) {
      run(environment, body);
    }
  }

  Child(Child&& other) noexcept
      : output_(std::exchange(other.output_, {})),
        process_(std::exchange(other.process_, 0)),
        status_(other.status_) {}
  Child& operator=(Child&&) = delete;

  ~Child() {
    end(0s);
    std::filesystem::remove(output_);
  }

  void kill() {
    end(0s);
  }

  /// Waits for its end, and brings that about when the time is over.
  void end(std::chrono::milliseconds limit) {
    const auto last = std::chrono::steady_clock::now() + limit;
    while (process_ > 0 && ::waitpid(process_, &status_, WNOHANG) == 0) {
      if (std::chrono::steady_clock::now() > last) {
        ::kill(process_, SIGKILL);
        ::waitpid(process_, &status_, 0);
        break;
      }
      std::this_thread::sleep_for(5ms);
    }
    process_ = 0;
  }

  /// Whether the function returned, and no expectation of it failed.
  bool succeeded() const {
    return WIFEXITED(status_) && WEXITSTATUS(status_) == 0;
  }
  bool was_killed() const {
    return WIFSIGNALED(status_) && WTERMSIG(status_) == SIGKILL;
  }
  /// What it printed, and the message of the exception that ended it.
  std::string output() const {
    return read(output_);
  }

 private:
  static int& count() {
    static int children = 0;
    return children;
  }

  [[noreturn]] void run(
      const std::map<std::string, std::string>& environment,
      const std::function<void()>& body) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL); // none is left behind
    const int file =
        ::open(output_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ::dup2(file, STDOUT_FILENO);
    ::dup2(file, STDERR_FILENO);
    for (const auto& [name, value] : environment) {
      ::setenv(name.c_str(), value.c_str(), /*overwrite=*/1);
    }
    bool threw = false;
    try {
      body();
    } catch (const std::exception& error) {
      std::printf("threw: %s\n", error.what());
      threw = true;
    }
    std::fflush(nullptr);
    std::_Exit(threw || testing::Test::HasFailure() ? 1 : 0);
  }

  std::filesystem::path output_;
  pid_t process_;
  int status_ = 0;
};

/// Runs a function in ranks `begin` to `end` - 1 of `size`, with the variables
/// that torchrun sets; returns when all have ended.
inline std::vector<Child> run_ranks(
    int begin,
    int end,
    int size,
    const std::function<void()>& body,
    std::map<std::string, std::string> environment = {},
    std::chrono::milliseconds limit = 120s) {
  environment.try_emplace("MASTER_ADDR", "127.0.0.1");
  environment.try_emplace("MASTER_PORT", std::to_string(free_port()));
  environment.try_emplace("WORLD_SIZE", std::to_string(size));
  std::vector<Child> ranks;
  for (int rank = begin; rank < end; ++rank) {
    environment["RANK"] = environment["LOCAL_RANK"] = std::to_string(rank);
    ranks.emplace_back(environment, body);
  }
  const auto last = std::chrono::steady_clock::now() + limit;
  for (Child& rank : ranks) {
    const auto left = last - std::chrono::steady_clock::now();
    rank.end(std::chrono::duration_cast<std::chrono::milliseconds>(left));
  }
  return ranks;
}

/// Expects a function to succeed in each of `size` ranks.
inline void expect_in_ranks(int size, const std::function<void()>& body) {
  const auto ranks = run_ranks(0, size, size, body);
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    EXPECT_TRUE(ranks[rank].succeeded())
        << "rank " << rank << " of " << size
        << (ranks[rank].was_killed() ? " did not end in time" : "") << ":\n"
        << ranks[rank].output();
  }
}

} // namespace memcnn_test
