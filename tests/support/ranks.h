// SPDX-License-Identifier: MIT
#pragma once

// Processes that a test starts as torchrun would.

#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <arpa/inet.h>
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
      : output_(std::tmpfile(), &std::fclose) {
    std::fflush(nullptr); // else both would print what waits to be
    process_ = ::fork();
    if (process_ == 0) {
      run(environment, body);
    }
  }

  Child(Child&& other) noexcept
      : output_(std::move(other.output_)),
        process_(std::exchange(other.process_, 0)),
        status_(other.status_) {}
  Child& operator=(Child&&) = delete;

  ~Child() {
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
    std::string text;
    std::rewind(output_.get());
    for (int c; (c = std::fgetc(output_.get())) != EOF;) {
      text += static_cast<char>(c);
    }
    return text;
  }

 private:
  [[noreturn]] void run(
      const std::map<std::string, std::string>& environment,
      const std::function<void()>& body) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL); // none is left behind
    ::dup2(::fileno(output_.get()), STDOUT_FILENO);
    ::dup2(::fileno(output_.get()), STDERR_FILENO);
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

  std::unique_ptr<std::FILE, int (*)(std::FILE*)> output_;
  pid_t process_ = 0;
  int status_ = 0;
};

/// Starts a function in ranks `begin` to `end` - 1 of `size`, with the variables
/// that torchrun sets.
inline std::vector<Child> start_ranks(
    int begin,
    int end,
    int size,
    const std::function<void()>& body,
    std::map<std::string, std::string> environment = {}) {
  environment.try_emplace("MASTER_ADDR", "127.0.0.1");
  environment.try_emplace("MASTER_PORT", std::to_string(free_port()));
  environment.try_emplace("WORLD_SIZE", std::to_string(size));
  std::vector<Child> ranks;
  for (int rank = begin; rank < end; ++rank) {
    environment["RANK"] = environment["LOCAL_RANK"] = std::to_string(rank);
    ranks.emplace_back(environment, body);
  }
  return ranks;
}

/// The same, and waits until all have ended.
inline std::vector<Child> run_ranks(
    int begin,
    int end,
    int size,
    const std::function<void()>& body,
    const std::map<std::string, std::string>& environment = {},
    std::chrono::milliseconds limit = 120s) {
  std::vector<Child> ranks = start_ranks(begin, end, size, body, environment);
  const auto last = std::chrono::steady_clock::now() + limit;
  for (Child& rank : ranks) {
    const auto left = last - std::chrono::steady_clock::now();
    rank.end(std::chrono::duration_cast<std::chrono::milliseconds>(left));
  }
  return ranks;
}

/// Expects a function to succeed in each of `size` ranks.
inline void expect_in_ranks(
    int size,
    const std::function<void()>& body,
    const std::map<std::string, std::string>& environment = {}) {
  const auto ranks = run_ranks(0, size, size, body, environment);
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    EXPECT_TRUE(ranks[rank].succeeded())
        << "rank " << rank << " of " << size
        << (ranks[rank].was_killed() ? " did not end in time" : "") << ":\n"
        << ranks[rank].output();
  }
}

} // namespace memcnn_test
