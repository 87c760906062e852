// SPDX-License-Identifier: MIT

// memcnn_train --distributed under torchrun, which starts all processes again
// where one is killed, and passes signals on.

#include "examples/train/distributed_run.h"
#include "support/process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace fs = std::filesystem;
using memcnn_test::Process;
using memcnn_test::Result;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

class Torchrun : public DistributedTest {
 protected:
  void SetUp() override {
    DistributedTest::SetUp();
    const auto found = shell("'" MEMCNN_PYTHON_WITH_TORCH
                             "' -c 'import torch.distributed.run'");
    if (found.exit_code != 0) {
      GTEST_SKIP() << "no torchrun";
    }
  }

  /// torchrun of some processes, each of which notes its number in the file
  /// pid.<rank>.
  Process
  start(int ranks, const std::string& arguments, const std::string& restarts) {
    std::vector<std::string> argv{
        MEMCNN_PYTHON_WITH_TORCH,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        std::to_string(ranks),
        "--max-restarts",
        restarts,
        "--no-python",
        "/bin/sh",
        "-c",
        // torchrun makes one $ of two.
        "echo $$$$ > new.$RANK && mv new.$RANK pid.$RANK && exec \"$0\" \"$@\""};
    for (const std::string& word : command(shared(arguments))) {
      argv.push_back(word);
    }
    return Process(directory_, "torchrun", argv);
  }

  static auto within(seconds most) {
    return std::chrono::steady_clock::now() + most;
  }

  /// The process of a rank, or 0 where there is none yet.
  pid_t process_of(int rank) const {
    pid_t pid = 0;
    std::ifstream(directory_ / ("pid." + std::to_string(rank))) >> pid;
    return pid;
  }

  /// Waits until something is so, or the run has ended.
  template <class Condition>
  static void wait_until(Process& run, const Condition& is_so) {
    const auto end = within(seconds(120));
    while (!is_so() && !run.has_ended()) {
      if (std::chrono::steady_clock::now() > end) {
        ADD_FAILURE() << "nothing goes on";
        return;
      }
      std::this_thread::sleep_for(milliseconds(5));
    }
  }
};

/// Kills processes of a run, one after the other.
class Killer final {
 public:
  Killer(fs::path checkpoint, int ranks)
      : checkpoint_(std::move(checkpoint)), ranks_(ranks) {}

  int next_victim() {
    return static_cast<int>(random_() % ranks_);
  }

  /// Either soon after a process has started, which is often before its first
  /// step, or within a second after the checkpoint was written.
  bool waits_for_a_checkpoint() {
    return random_() % 4 != 0;
  }

  milliseconds a_moment(int most) {
    return milliseconds(std::uniform_int_distribution<int>(0, most)(random_));
  }

  fs::file_time_type written() const {
    std::error_code error;
    const auto time = fs::last_write_time(checkpoint_, error);
    return error ? fs::file_time_type::min() : time;
  }

 private:
  fs::path checkpoint_;
  int ranks_;
  std::mt19937 random_{/*seed=*/1};
};

class RestartedRun : public Torchrun,
                     public testing::WithParamInterface<int> {};

TEST_P(RestartedRun, IsTheSameHoweverOftenAProcessIsKilled) {
  // MEMCNN_TEST_KILLS=20 takes some minutes.
  const char* asked = std::getenv("MEMCNN_TEST_KILLS");
  const int kills = asked != nullptr ? std::atoi(asked) : 2;
  const std::string steps =
      "revnet38 synthetic --checkpoint-every 2 --evaluate-every 7 "
      "--test-images 450 --iterations " +
      std::to_string(10 + 8 * kills) + " --results-dir ";
  const auto whole = run(GetParam(), steps + "whole");
  ASSERT_EQ(whole[0].exit_code, 0) << whole[0].err;

  Killer killer(directory_ / "parts" / "checkpoint.memcnn", GetParam());
  Process parts = start(GetParam(), steps + "parts", std::to_string(kills));
  std::map<int, pid_t> killed;
  int hits = 0;
  for (int i = 0; i < kills; ++i) {
    const int victim = killer.next_victim();
    const auto is_new = [&] {
      const pid_t pid = process_of(victim);
      return pid != 0 && pid != killed[victim];
    };
    wait_until(parts, is_new);
    if (killer.waits_for_a_checkpoint()) {
      const auto before = killer.written();
      wait_until(parts, [&] { return killer.written() != before; });
      std::this_thread::sleep_for(killer.a_moment(1000));
    } else {
      std::this_thread::sleep_for(killer.a_moment(3000));
    }
    // All have others by the next start.
    for (int rank = 0; rank < GetParam(); ++rank) {
      killed[rank] = process_of(rank);
    }
    hits += !parts.has_ended() && ::kill(killed[victim], SIGKILL) == 0 ? 1 : 0;
  }
  const Result result = parts.wait(within(seconds(120)));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_GT(hits, 0);
  RecordProperty("hits", hits);
  EXPECT_EQ(log_of("parts"), log_of("whole"));
  EXPECT_EQ(results_of("parts"), results_of("whole"));
}

INSTANTIATE_TEST_SUITE_P(
    Processes,
    RestartedRun,
    testing::Values(2, 3),
    testing::PrintToStringParamName());

TEST_F(Torchrun, PassesAnInterruptOn) {
  Process parts =
      start(2, "resnet32 synthetic --iterations 500 --results-dir here", "0");
  wait_until(parts, [&] {
    return parts.out().find("iteration:2 ") != std::string::npos;
  });
  parts.signal(SIGINT);
  const Result result = parts.wait(within(seconds(40)));
  EXPECT_NE(result.exit_code, 0);
  EXPECT_THAT(result.out, HasSubstr("stopped at iteration "));
  EXPECT_TRUE(fs::exists(here("checkpoint.memcnn")));
}

} // namespace
