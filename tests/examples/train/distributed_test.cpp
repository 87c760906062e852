// SPDX-License-Identifier: MIT

// memcnn_train --distributed: processes that train one network, end together
// whatever happens to one of them, and go on as if nothing had.

#include "examples/train/distributed_run.h"
#include "support/program_ranks.h"
#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/resource.h>

namespace {

namespace fs = std::filesystem;
using memcnn_test::ProgramRanks;
using memcnn_test::read;
using memcnn_test::Result;
using memcnn_test::rows;
using testing::AllOf;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::MatchesRegex;
using testing::Not;
using testing::StartsWith;

class DistributedRun : public DistributedTest {
 protected:
  /// Waits until the leader has printed the row of an iteration.
  static void wait_for_row(ProgramRanks& ranks, int iteration) {
    const std::string row = "iteration:" + std::to_string(iteration) + " ";
    for (int i = 0; i < 3000; ++i) {
      if (ranks[0].out().find(row) != std::string::npos) {
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ADD_FAILURE() << "there is no row " << iteration;
  }

  /// One message, of the leader; all ranks end with the code.
  static void expect_error_of_all(
      const std::vector<Result>& results,
      const testing::Matcher<std::string>& message) {
    EXPECT_THAT(results.at(0).err, message);
    for (size_t rank = 0; rank < results.size(); ++rank) {
      EXPECT_EQ(results[rank].exit_code, 1) << rank;
      EXPECT_EQ(rank > 0 ? results[rank].err : "", "");
      EXPECT_EQ(rank > 0 ? results[rank].out : "", "");
    }
  }
};

TEST_F(DistributedRun, PrintsAndWritesByItsLeaderAlone) {
  const auto results =
      run(2,
          "revnet38 synthetic --iterations 3 --test-images 8 --memory-budget 1 "
          "--check-inverse 2 --evaluate-every 2 --save-weights weights.pt "
          "--results-dir here");
  EXPECT_EQ(results[0].exit_code, 0) << results[0].err;
  EXPECT_EQ(results[0].err, "");
  EXPECT_EQ(results[1].exit_code, 0) << results[1].err;
  EXPECT_EQ(results[1].err + results[1].out, "");
  EXPECT_THAT(
      results[0].out,
      AllOf(
          HasSubstr("  processes 2, each on 6 images of a batch, gradients "
                    "averaged by gloo\n"),
          HasSubstr("\nkept for backward: "),
          HasSubstr("\niteration:2 inverse_error:"),
          HasSubstr("\nweights: weights.pt\n")));
  EXPECT_EQ(rows(results[0].out).size(), 6U);
  EXPECT_TRUE(fs::exists(directory_ / "weights.pt"));
  for (const char* name : {"run.json", "results.json"}) {
    const Json written = Json::parse(read(here(name)));
    EXPECT_EQ(written.at("processes"), 2);
    EXPECT_EQ(written.at("backend"), "gloo");
    EXPECT_EQ(written.at("config").at("batch_size"), 12);
  }
}

TEST_F(DistributedRun, EvaluatesAsOneProcessDoes) {
  const auto trained = train(
      "resnet32 synthetic --iterations 2 --batch-size 4 --threads 1 --no-cuda "
      "--test-images 8 --save-weights weights.pt");
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  // Batches of 200, 200 and 50.
  const std::string evaluation =
      "resnet32 synthetic --iterations 0 --test-images 450 --load-weights "
      "weights.pt --results-dir ";
  const auto one = train(
      evaluation + "1 --batch-size 12 --log-every 1 --threads 1 --no-cuda");
  ASSERT_EQ(one.exit_code, 0) << one.err;
  for (const int ranks : {2, 3}) {
    const std::string folder = std::to_string(ranks);
    const auto several = run(ranks, evaluation + folder);
    ASSERT_EQ(several[0].exit_code, 0) << several[0].err;
    EXPECT_EQ(rows(several[0].out), rows(one.out));
    for (const char* figure :
         {"test_accuracy", "test_top5", "test_loss", "class_accuracy"}) {
      EXPECT_EQ(results_of(folder).at(figure), results_of("1").at(figure))
          << figure;
    }
  }
}

// --- ends -------------------------------------------------------------------

TEST_F(DistributedRun, StopsForASignalToAnyOfItAndGoesOn) {
  const std::string steps =
      "resnet32 synthetic --iterations 40 --test-images 8 --checkpoint-every 5 "
      "--results-dir ";
  ASSERT_EQ(run(2, steps + "whole")[0].exit_code, 0);
  std::string folder = "parts";
  for (const std::vector<int>& to :
       std::vector<std::vector<int>>{{0}, {1}, {0, 1}}) {
    folder += "s";
    const int signal = to.size() > 1 ? SIGINT : SIGTERM;
    ProgramRanks ranks(2, directory_, command(shared(steps + folder)));
    wait_for_row(ranks, 2);
    for (const int rank : to) {
      ranks[rank].signal(signal);
    }
    const auto stopped = ranks.wait(std::chrono::seconds(30));
    EXPECT_EQ(stopped[0].exit_code, 128 + signal) << stopped[0].err;
    EXPECT_EQ(stopped[1].exit_code, 128 + signal) << stopped[1].err;
    EXPECT_EQ(stopped[0].err + stopped[1].err + stopped[1].out, "");
    EXPECT_THAT(stopped[0].out, HasSubstr("stopped at iteration "));
    const auto done = run(2, steps + folder);
    EXPECT_THAT(done[0].out, StartsWith("going on from " + folder + "/check"));
    EXPECT_EQ(log_of(folder), log_of("whole"));
    EXPECT_EQ(results_of(folder), results_of("whole"));
  }
}

TEST_F(DistributedRun, EndsTogetherWhereALossIsNotFinite) {
  expect_error_of_all(
      run(3,
          "resnet32 synthetic --iterations 5 --test-images 8 --learning-rate "
          "1e30 --checkpoint-every 1 --results-dir here"),
      MatchesRegex(
          "memcnn_train: expected the loss to be finite, but got -?(nan|inf) at "
          "iteration 2\\. The first value that is not finite is in the output "
          "of .+ \\(now 1e\\+30\\) with --fresh, or .+: the last good "
          "checkpoint stays in here/checkpoint.memcnn until then\\.\n"));
  EXPECT_EQ(
      run(3,
          "resnet32 synthetic --iterations 1 --test-images 8 "
          "--learning-rate 1e30 --results-dir here")[0]
          .exit_code,
      0);
}

TEST_F(DistributedRun, EndsWhereTheDiskOfItsLeaderIsFull) {
  const std::string steps =
      "resnet32 synthetic --iterations 6 --test-images 8 --checkpoint-every 3 "
      "--results-dir here";
  ASSERT_EQ(run(2, steps)[0].exit_code, 0);
  const auto log = log_of("here");
  fs::rename(here("checkpoint.previous.memcnn"), here("checkpoint.memcnn"));
  const auto before = read(here("checkpoint.memcnn"));
  const auto full = [](int rank, std::vector<std::string>& /*argv*/) {
    const rlimit least{500000, 500000}; // bytes of a file
    if (rank == 0) {
      ::setrlimit(RLIMIT_FSIZE, &least);
    }
  };
  expect_error_of_all(
      ProgramRanks(2, directory_, command(shared(steps)), full).wait(),
      "memcnn_train: expected here/checkpoint.memcnn to be writable, but "
      "writing it failed: File too large. Make room on the disk, or give "
      "another --results-dir.\n");
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
  ASSERT_EQ(run(2, steps)[0].exit_code, 0);
  EXPECT_EQ(log_of("here"), log);
}

TEST_F(DistributedRun, EndsWhereAProcessIsKilled) {
  for (const int victim : {0, 1}) {
    ProgramRanks ranks(
        3,
        directory_,
        command(shared(
            "resnet32 synthetic --iterations 500 --results-dir " +
            std::to_string(victim))));
    wait_for_row(ranks, 2);
    ranks[victim].signal(SIGKILL);
    const auto ended = ranks.wait(std::chrono::seconds(30));
    EXPECT_EQ(ended[victim].exit_code, -1);
    EXPECT_EQ(ended[1 - victim].exit_code, 1);
    EXPECT_EQ(ended[2].exit_code, 1);
    EXPECT_EQ(ended[1].err + ended[2].err, "");
    if (victim != 0) {
      EXPECT_THAT(
          ended[0].err,
          AllOf(
              StartsWith(
                  "memcnn_train: expected the other processes to go on, but "
                  "one of them has ended or does not answer ("),
              EndsWith("). See what it or torchrun has printed. The same "
                       "command goes on from the last checkpoint.\n")));
    }
  }
}

/// Images of the size and form of the published ones, black but for one pixel.
void write_cifar100(const fs::path& directory) {
  fs::create_directories(directory);
  for (const auto& [name, images] :
       {std::pair("train.bin", 50000), std::pair("test.bin", 10000)}) {
    std::ofstream(directory / name) << "012";
    fs::resize_file(directory / name, images * uintmax_t{3074});
  }
}

TEST_F(DistributedRun, EndsWhereTheDataOfAProcessAreOthersOrGone) {
  write_cifar100(directory_ / "0");
  write_cifar100(directory_ / "1");
  std::fstream(directory_ / "1" / "test.bin", std::ios::in | std::ios::out)
      << "013"; // the pixel, after two labels
  const auto own_data = [](int rank, std::vector<std::string>& argv) {
    argv.push_back("--data-dir=" + std::to_string(rank));
  };
  const auto steps = command(shared("resnet32 cifar100 --iterations 2"));
  expect_error_of_all(
      ProgramRanks(2, directory_, steps, own_data).wait(),
      MatchesRegex(
          "memcnn_train: expected the same images of cifar100 for all "
          "processes, but rank 0 has read some with checksum [0-9a-f]+ and rank "
          "1 with [0-9a-f]+\\. Give each machine the same files\\.\n"));

  fs::remove(directory_ / "1" / "test.bin");
  const auto results = ProgramRanks(2, directory_, steps, own_data).wait();
  EXPECT_EQ(results[0].exit_code, 1);
  EXPECT_THAT(results[0].err, HasSubstr("expected the other processes to go"));
  EXPECT_EQ(results[1].exit_code, 1);
  EXPECT_THAT(
      results[1].err,
      StartsWith("memcnn_train: rank 1: expected 1/test.bin to be a file of"));
  EXPECT_FALSE(fs::exists(directory_ / "results"));
}

TEST_F(DistributedRun, GivesUpAProcessThatHangs) {
  ProgramRanks ranks(
      2,
      directory_,
      command(shared("resnet32 synthetic --iterations 500 --peer-timeout 20")));
  wait_for_row(ranks, 2);
  ranks[1].signal(SIGSTOP);
  const Result leader = ranks[0].wait(
      std::chrono::steady_clock::now() + std::chrono::seconds(60));
  EXPECT_EQ(leader.exit_code, 1);
  EXPECT_THAT(
      leader.err,
      HasSubstr("expected the other processes to go on, but one of them has "
                "ended or does not answer ("));
}

TEST_F(DistributedRun, TakesItsShareOfTheCores) {
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  for (const int processes : {1, 2 * cores}) {
    const auto local = [&](int /*rank*/, std::vector<std::string>& /*argv*/) {
      const auto size = std::to_string(processes);
      ::setenv("LOCAL_WORLD_SIZE", size.c_str(), /*overwrite=*/1);
    };
    ProgramRanks(
        1,
        directory_,
        command("resnet32 synthetic --iterations 0 --test-images 8 --no-cuda "
                "--distributed --results-dir here"),
        local)
        .wait();
    EXPECT_EQ(
        Json::parse(read(here("run.json"))).at("threads"),
        processes == 1 ? cores : 1);
  }
}

TEST_F(DistributedRun, WarnsOfACheckpointOfAnotherNumberOfProcesses) {
  const std::string steps =
      "resnet32 synthetic --test-images 8 --results-dir here --iterations ";
  ASSERT_EQ(run(3, steps + "2")[0].exit_code, 0);
  const auto more = run(2, steps + "3");
  EXPECT_EQ(more[0].exit_code, 0);
  EXPECT_EQ(
      more[0].err,
      "memcnn_train: warning: the checkpoint here/checkpoint.memcnn is of a run "
      "of 3 processes, and goes on with 2: each normalises over another share "
      "of a batch, and losses differ\n");
  EXPECT_EQ(more[1].err, "");
  EXPECT_EQ(log_of("here").size(), 3U);
}

// --- what cannot begin ------------------------------------------------------

TEST_F(DistributedRun, RejectsWhatItsProcessesCannotShare) {
  const std::string steps = "resnet32 synthetic --iterations 2";
  expect_error_of_all(
      ProgramRanks(3, directory_, command(shared(steps, "13"))).wait(),
      "memcnn_train: expected --batch-size to be divisible by the 3 processes, "
      "but got 13. Give 12 or 15, or start another number of processes.\n");
  const auto other_batch = [](int rank, std::vector<std::string>& argv) {
    if (rank == 1) {
      std::replace(
          argv.begin(), argv.end(), std::string("12"), std::string("13"));
    }
  };
  expect_error_of_all(
      ProgramRanks(2, directory_, command(shared(steps)), other_batch).wait(),
      "memcnn_train: expected the same options for all processes, but rank 0 "
      "has --batch-size 12 and rank 1 has --batch-size 13. Start them with one "
      "command.\n");
  const auto other_rate = [](int rank, std::vector<std::string>& argv) {
    argv.push_back(rank == 1 ? "--learning-rate=0.2" : "--learning-rate=0.1");
  };
  expect_error_of_all(
      ProgramRanks(2, directory_, command(shared(steps)), other_rate).wait(),
      "memcnn_train: expected the same options for all processes, but rank 0 "
      "has --learning-rate 0.1 and rank 1 has --learning-rate 0.2. Start them "
      "with one command.\n");
  EXPECT_FALSE(fs::exists(directory_ / "results"));
}

TEST_F(DistributedRun, RejectsSeveralProcessesThatDoNotKnowOfEachOther) {
  expect_error_of_all(
      ProgramRanks(2, directory_, command("resnet32 synthetic --iterations 2"))
          .wait(),
      "memcnn_train: expected --distributed where several processes are "
      "started, but got WORLD_SIZE 2 without it. Give --distributed, or start "
      "one process.\n");
  EXPECT_FALSE(fs::exists(directory_ / "results"));
}

TEST_F(DistributedRun, RejectsAnEnvironmentThatIsNotTorchruns) {
  const std::string steps = shared("resnet32 synthetic --iterations 2");
  expect_error(
      train(steps),
      "World::join(): expected the environment variable WORLD_SIZE, but it is "
      "not set. Start the program with torchrun --no-python.");
  const auto expect_refused = [&](const char* name, const char* value) {
    const auto set = [&](int /*rank*/, std::vector<std::string>& /*argv*/) {
      ::setenv(name, value, /*overwrite=*/1);
    };
    const auto result =
        ProgramRanks(1, directory_, command(steps), set).wait()[0];
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_THAT(
        result.err,
        AllOf(
            HasSubstr(name),
            HasSubstr(std::string("but got \"") + value + "\"")));
  };
  expect_refused("RANK", "first");
  expect_refused("RANK", "1");
  expect_refused("MASTER_PORT", "none");
}

TEST_F(DistributedRun, RejectsFlagsThatARestartWouldObeyAgain) {
  const auto restartable = [](int /*rank*/, std::vector<std::string>& argv) {
    ::setenv("TORCHELASTIC_MAX_RESTARTS", "3", /*overwrite=*/1);
    argv.push_back("--fresh");
  };
  expect_error_of_all(
      ProgramRanks(
          2,
          directory_,
          command(shared("resnet32 synthetic --iterations 2")),
          restartable)
          .wait(),
      "memcnn_train: expected no --fresh with --max-restarts of torchrun, since "
      "every restart would obey it again. Run once without --max-restarts, or "
      "give another --results-dir.\n");
}

TEST_F(DistributedRun, RejectsWhatOnlyOneProcessCanDo) {
  for (const std::string option : {"--compare-plain 3", "--cuda-graph"}) {
    const auto result = train("revnet38 synthetic --distributed " + option);
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_THAT(
        result.err,
        MatchesRegex("memcnn_train: expected a valid command line, but got: "
                     ".+ excludes .+\\. See memcnn_train --help\\.\n"));
  }
}

TEST_F(DistributedRun, GivesUpAProcessThatNeverComes) {
  const auto results =
      ProgramRanks(
          2,
          directory_,
          command(shared("resnet32 synthetic --peer-timeout 5")),
          /*setup=*/{},
          /*absent=*/1)
          .wait();
  EXPECT_EQ(results[0].exit_code, 1);
  EXPECT_THAT(
      results[0].err,
      HasSubstr("expected 2 ranks to join within 5000 ms, but rank 1 did not"));
}

// --- on a GPU ---------------------------------------------------------------

class DistributedRunCuda : public DistributedTest {
 protected:
  void SetUp() override {
    DistributedTest::SetUp();
    if (!has_gpu()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }

  static constexpr const char* kSteps =
      " revnet38 synthetic --iterations 6 --batch-size 12 --test-images 8 "
      "--log-every 1 --evaluate-every 3 --deterministic ";

  std::vector<Result> run_on_gpu(int ranks, const std::string& options) {
    // However many there are, the processes share the first.
    const auto first_alone = [](int /*rank*/, std::vector<std::string>&) {
      ::setenv("CUDA_VISIBLE_DEVICES", "0", /*overwrite=*/1);
    };
    return ProgramRanks(
               ranks,
               directory_,
               command(kSteps + options + " --distributed"),
               first_alone)
        .wait(std::chrono::seconds(120));
  }
};

TEST_F(DistributedRunCuda, LearnsInOneProcessWhatARunByItselfLearns) {
  const auto alone = train(kSteps + std::string("--no-cuda-graph"));
  ASSERT_EQ(alone.exit_code, 0) << alone.err;
  for (const std::string backend : {"automatic", "gloo"}) {
    const auto found =
        run_on_gpu(1, "--results-dir " + backend + " --backend " + backend)[0];
    ASSERT_EQ(found.exit_code, 0) << found.err;
    EXPECT_EQ(rows(found.out), rows(alone.out));
    const Json run = Json::parse(read(directory_ / backend / "run.json"));
    EXPECT_EQ(run.at("cuda_graph"), false);
    std::cout << "by " << run.at("backend")
              << "\n"; // NCCL, where it is built in
  }
}

TEST_F(DistributedRunCuda, SharesAGpuByGloo) {
  const auto found = run_on_gpu(2, "--backend gloo --results-dir here");
  ASSERT_EQ(found[0].exit_code, 0) << found[0].err;
  EXPECT_EQ(found[1].exit_code, 0) << found[1].err;
  EXPECT_EQ(found[1].out, "");
  run(2, "revnet38 synthetic --iterations 1 --test-images 8 --results-dir cpu");
  EXPECT_NEAR(
      log_of("here").at(0).at("loss").get<double>(),
      log_of("cpu").at(0).at("loss").get<double>(),
      1e-2); // TF32
  EXPECT_EQ(log_of("here").size(), 6U);

  const auto again = run_on_gpu(2, "--backend gloo --results-dir again");
  EXPECT_EQ(rows(again[0].out), rows(found[0].out));
}

TEST_F(DistributedRunCuda, WantsAGpuForEachProcessWithNccl) {
  for (const Result& result : run_on_gpu(2, "--backend nccl")) {
    EXPECT_EQ(result.exit_code, 1);
  }
  EXPECT_FALSE(fs::exists(directory_ / "results" / "revnet38-synthetic"));
}

} // namespace
