// SPDX-License-Identifier: MIT

// Runs of memcnn_train that are stopped, killed or robbed of their files, and
// go on as if nothing had happened, or say why they cannot.

#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <regex>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::rows;
using memcnn_test::write;
using nlohmann::json;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

/// What a log says, but for what depends on the speed of the machine.
std::vector<json> log_of(const fs::path& directory) {
  std::vector<json> found;
  std::istringstream lines(read(directory / "log.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    found.push_back(json::parse(line));
    found.back().erase("ms_per_step");
    found.back().erase("data_ms_per_step");
  }
  return found;
}

/// Likewise of the results.
json results_of(const fs::path& directory) {
  json results = json::parse(read(directory / "results.json"));
  results.at("step").erase("median_ms_per_step");
  return results;
}

/// Files of the size and form of the published ones, in which a few images are
/// noise of any class, and the others black.
void write_cifar(const std::string& data_set, const fs::path& directory) {
  const bool fine = data_set == "cifar100";
  const int label_bytes = fine ? 2 : 1;
  std::vector<std::pair<std::string, int>> files{
      {"train.bin", 50000}, {"test.bin", 10000}};
  if (!fine) {
    files = {{"test_batch.bin", 10000}};
    for (int part = 1; part <= 5; ++part) {
      files.emplace_back("data_batch_" + std::to_string(part) + ".bin", 10000);
    }
  }
  std::mt19937 random(/*seed=*/1);
  for (const auto& [name, records] : files) {
    std::ofstream file(directory / name, std::ios::binary);
    for (int record = 0; record < 100; ++record) {
      if (fine) {
        file.put('\0'); // the coarse label
      }
      file.put(static_cast<char>(fine ? record : record % 10));
      for (int i = 0; i < 3072; ++i) {
        file.put(static_cast<char>(random() % 256));
      }
    }
    file.close();
    fs::resize_file(
        directory / name,
        static_cast<uintmax_t>(records) * (label_bytes + 3072));
  }
}

class SurvivingRun : public memcnn_test::TrainProgramTest {
 protected:
  /// As if the run had been killed after its fifth step.
  void go_back_to_the_third_step() {
    fs::rename(here("checkpoint.previous.memcnn"), here("checkpoint.memcnn"));
  }
};

TEST_F(SurvivingRun, WritesItsLogLineByLine) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 4 --evaluate-every 3 --results-dir "
      "here");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const json run = json::parse(read(here("run.json")));
  EXPECT_EQ(run.at("config").at("model"), "revnet38");
  EXPECT_EQ(run.at("device"), "cpu");
  EXPECT_EQ(run.at("threads"), 1);
  EXPECT_EQ(run.at("parameters"), 573994);
  EXPECT_EQ(run.at("parameter_bytes"), 4 * 573994);
  EXPECT_EQ(run.at("classes"), 10);
  EXPECT_EQ(run.at("train_images"), 10000);
  EXPECT_EQ(run.at("test_images"), 8);
  EXPECT_EQ(run.at("data_fingerprint").get<std::string>().size(), 8U);
  EXPECT_TRUE(run.at("memcnn").is_string());
  EXPECT_TRUE(run.at("libtorch").is_string());

  const auto log = log_of(directory_ / "here");
  ASSERT_EQ(log.size(), 4U);
  for (size_t i = 0; i < log.size(); ++i) {
    EXPECT_EQ(log[i].at("iteration"), i + 1);
    EXPECT_GT(log[i].at("loss"), 0);
    EXPECT_LE(log[i].at("accuracy"), log[i].at("top5"));
    EXPECT_LE(log[i].at("top5"), 1);
    EXPECT_GT(log[i].at("held_bytes"), 0);
    EXPECT_GT(log[i].at("peak_bytes"), log[i].at("held_bytes"));
    EXPECT_EQ(log[i].contains("test_accuracy"), i == 2);
    EXPECT_EQ(log[i].contains("test_loss"), i == 2);
    EXPECT_EQ(log[i].contains("test_top5"), i == 2);
  }
  const json results = results_of(directory_ / "here");
  EXPECT_LE(results.at("test_accuracy"), results.at("test_top5"));
}

TEST_F(SurvivingRun, GoesOnAfterEverySignalThatAsksItToStop) {
  const std::string run = brief("resnet32 synthetic --iterations 40");
  const auto whole = train(run + " --results-dir whole");
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    SCOPED_TRACE(signal);
    const std::string parts = "parts" + std::to_string(signal);
    const auto first = train_shell(
        "rm -f rows; $TRAIN " + run + " --results-dir " + parts +
        " > rows & until grep -q loss rows; do sleep 0.05; done; kill -" +
        std::to_string(signal) + " $!; wait $!; code=$?; cat rows; exit $code");
    EXPECT_EQ(first.exit_code, 128 + signal) << first.err;
    EXPECT_THAT(first.out, HasSubstr("stopped at iteration "));
    const auto second = train(run + " --results-dir " + parts);
    EXPECT_EQ(second.exit_code, 0) << second.err;
    EXPECT_THAT(
        second.out,
        StartsWith(
            "going on from " + parts + "/checkpoint.memcnn at iteration "));
    auto both = rows(first.out);
    for (const auto& row : rows(second.out)) {
      both.push_back(row);
    }
    EXPECT_EQ(both, rows(whole.out));
    EXPECT_EQ(log_of(directory_ / parts), log_of(directory_ / "whole"));
    EXPECT_EQ(results_of(directory_ / parts), results_of(directory_ / "whole"));
    EXPECT_FALSE(
        fs::exists(directory_ / parts / "checkpoint.memcnn.memcnn-partial"));

    const auto third = train(run + " --results-dir " + parts); // all done
    EXPECT_EQ(third.exit_code, 0);
    EXPECT_EQ(rows(third.out).back(), rows(whole.out).back());
  }
}

struct EveryNetwork
    : SurvivingRun,
      testing::WithParamInterface<std::tuple<std::string, std::string>> {};

TEST_P(EveryNetwork, StartsTrainsStopsGoesOnAndReports) {
  const auto& [model, data_set] = GetParam();
  write_cifar(data_set, directory_);
  // The small ones must not be done before the signal comes.
  const std::string steps =
      model == "resnet32" || model == "revnet38" ? "30" : "10";
  const std::string run = brief(
      model + " " + data_set +
      " --data-dir . --evaluate-every 4 --iterations " + steps);
  const auto first = train_shell(
      "$TRAIN " + run +
      " > rows & until grep -q loss rows; do sleep 0.05; done; kill -INT $!; "
      "wait $!; code=$?; cat rows; exit $code");
  EXPECT_EQ(first.exit_code, 128 + SIGINT) << first.err;
  const auto second = train(run);
  EXPECT_EQ(second.exit_code, 0) << second.err;

  const fs::path results = directory_ / "results" / (model + "-" + data_set);
  const auto whole = train(run + " --results-dir whole");
  EXPECT_EQ(log_of(results), log_of(directory_ / "whole"));
  EXPECT_EQ(results_of(results), results_of(directory_ / "whole"));
  const json about = json::parse(read(results / "run.json"));
  EXPECT_EQ(about.at("classes"), data_set == "cifar10" ? 10 : 100);

  const std::string python = MEMCNN_REPORT_PYTHON;
  if (python.empty()) {
    GTEST_SKIP() << "no Python that can report: the page is left out";
  }
  const auto report =
      shell("'" + python + "' '" MEMCNN_REPORT "' whole results/*");
  EXPECT_EQ(report.exit_code, 0) << report.err;
  const auto page = read(directory_ / "report.html");
  EXPECT_THAT(page, HasSubstr("finished"));
}

INSTANTIATE_TEST_SUITE_P(
    Networks,
    EveryNetwork,
    testing::Combine(
        testing::Values(
            "resnet32",
            "resnet110",
            "resnet164",
            "revnet38",
            "revnet110",
            "revnet164"),
        testing::Values("cifar10", "cifar100")),
    [](const auto& test) {
      return std::get<0>(test.param) + "_" + std::get<1>(test.param);
    });

/// Starts the program and kills it: at a moment that has nothing to do with
/// what it does, which is often before its first step, or within a second after
/// it has written the file, however long that takes.
void start_and_kill(
    const std::vector<std::string>& arguments,
    const fs::path& file,
    std::mt19937& random) {
  const auto milliseconds = [&](int most) {
    return std::chrono::milliseconds(
        std::uniform_int_distribution<int>(0, most)(random));
  };
  const auto written = [&] {
    std::error_code error;
    const auto time = fs::last_write_time(file, error);
    return error ? fs::file_time_type::min() : time;
  };
  const auto before = written();
  const pid_t child = ::fork();
  if (child == 0) {
    std::vector<char*> argv;
    for (const auto& argument : arguments) {
      argv.push_back(const_cast<char*>(argument.c_str()));
    }
    argv.push_back(nullptr);
    const int nowhere = ::open("/dev/null", O_WRONLY);
    ::dup2(nowhere, STDOUT_FILENO);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  int status = 0;
  if (random() % 4 == 0) {
    std::this_thread::sleep_for(milliseconds(3000));
  } else {
    while (written() == before && ::waitpid(child, &status, WNOHANG) == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    std::this_thread::sleep_for(milliseconds(1000));
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, &status, 0);
}

TEST_F(SurvivingRun, IsTheSameHoweverOftenItIsKilled) {
  // MEMCNN_TEST_KILLS=100 is for an evening.
  const char* asked = std::getenv("MEMCNN_TEST_KILLS");
  const int64_t kills = asked != nullptr ? std::atoi(asked) : 6;
  const std::string run = brief(
      "revnet38 synthetic --checkpoint-every 2 --evaluate-every 7 "
      "--iterations " +
      std::to_string(4 * kills));
  const auto whole = train(run + " --results-dir whole");
  ASSERT_EQ(whole.exit_code, 0) << whole.err;

  std::mt19937 random(/*seed=*/1);
  std::vector<std::string> arguments{MEMCNN_TRAIN};
  const fs::path parts = directory_ / "parts";
  std::istringstream words(run + " --results-dir " + parts.string());
  for (std::string word; words >> word;) {
    arguments.push_back(word);
  }
  int64_t resumed = 0;
  for (int64_t i = 0; i < kills; ++i) {
    start_and_kill(arguments, parts / "checkpoint.memcnn", random);
    resumed += fs::exists(parts / "checkpoint.memcnn") ? 1 : 0;
  }
  EXPECT_GT(resumed, kills / 2);
  const auto last = train(run + " --results-dir parts");
  ASSERT_EQ(last.exit_code, 0) << last.err;
  EXPECT_EQ(log_of(parts), log_of(directory_ / "whole"));
  EXPECT_EQ(results_of(parts), results_of(directory_ / "whole"));
}

TEST_F(SurvivingRun, StartsAnewIfAsked) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto log = log_of(directory_ / "here");
  go_back_to_the_third_step();
  const auto again = train(six_steps() + " --fresh");
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(rows(again.out).size(), 7U);
  EXPECT_EQ(log_of(directory_ / "here"), log);
}

TEST_F(SurvivingRun, RefusesCheckpointOfAnotherRunUnlessFresh) {
  const std::string same = " synthetic --iterations 1 --results-dir here";
  ASSERT_EQ(short_run("resnet32" + same).exit_code, 0);
  const auto before = read(here("checkpoint.memcnn"));
  expect_error(
      short_run("revnet38" + same),
      "expected the checkpoint here/checkpoint.memcnn to be of a run with MODEL "
      "\"revnet38\", but it is of one with MODEL \"resnet32\". Give --fresh to "
      "overwrite it, or another --results-dir.");
  expect_error(
      short_run("resnet32 --seed 7" + same),
      "expected the checkpoint here/checkpoint.memcnn to have seed 7, but got "
      "42: its weights and the order of its images followed from that, and with "
      "another seed it is another run. Give --seed 42 to go on, --fresh to "
      "overwrite it, or another --results-dir.");
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
  EXPECT_TRUE(fs::exists(here("results.json")));
  EXPECT_EQ(short_run("revnet38 --fresh" + same).exit_code, 0);
}

TEST_F(SurvivingRun, NamesTheFlagsThatDiffer) {
  const auto expect_flags = [&](const std::string& first,
                                const std::string& second,
                                const std::string& text) {
    const std::string run = "revnet38 synthetic --results-dir here ";
    ASSERT_EQ(short_run(run + "--fresh --iterations 1 " + first).exit_code, 0);
    EXPECT_THAT(
        short_run(run + "--iterations 1 " + second).err,
        HasSubstr("to be of a run with " + text + ". Give --fresh"));
  };
  expect_flags(
      "--keep-transitions",
      "",
      "no --keep-transitions, but it is of one with --keep-transitions");
  expect_flags(
      "--memory-budget 3",
      "--memory-budget 4",
      "--memory-budget 4, but it is of one with --memory-budget 3");
  expect_flags(
      "--plain",
      "--amp",
      "--engine \"sequence\", but it is of one with --plain");
  expect_flags(
      "",
      "--fractional-bits 12",
      "--fractional-bits 12, but it is of one with no --fractional-bits");
}

TEST_F(SurvivingRun, RefusesFewerIterationsThanAreDone) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto before = read(here("checkpoint.memcnn"));
  expect_error(
      short_run("resnet32 synthetic --iterations 5 --results-dir here"),
      "expected --iterations to be at least the 6 that the checkpoint "
      "here/checkpoint.memcnn has done, but got 5. Give --iterations 6 to "
      "evaluate it as it is, --fresh to overwrite it with a shorter run, or "
      "another --results-dir.");
  const auto evaluated = train(six_steps());
  EXPECT_THAT(evaluated.out, HasSubstr("done: evaluation only"));
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
}

TEST_F(SurvivingRun, TrainsLongerOrShorterWhereItIsAskedTo) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto run = [&](int iterations) {
    return short_run(
        "resnet32 synthetic --results-dir here --checkpoint-every 3 "
        "--iterations " +
        std::to_string(iterations));
  };
  const auto longer = run(9);
  EXPECT_EQ(longer.exit_code, 0) << longer.err;
  EXPECT_THAT(
      longer.out,
      StartsWith(
          "going on from here/checkpoint.memcnn at iteration 6\n"
          "training for 9 iterations instead of 6: from here on the learning "
          "rate falls where it does in a run of that length\n"));
  const auto earlier = [&] {
    return json::parse(read(here("run.json"))).at("earlier_iterations");
  };
  EXPECT_EQ(earlier(), json({6}));
  const auto log = log_of(directory_ / "here");
  ASSERT_EQ(log.size(), 9U);
  EXPECT_EQ(log[5].at("lr"), 0.001); // of 6
  EXPECT_EQ(log[6].at("lr"), 0.01); // of 9
  EXPECT_EQ(log[8].at("iteration"), 9);

  const auto same = run(9);
  EXPECT_THAT(same.out, Not(HasSubstr("instead of")));
  EXPECT_EQ(earlier(), json({6})) << "the checkpoint knows";

  EXPECT_EQ(run(20).exit_code, 0);
  EXPECT_EQ(earlier(), json({6, 9}));
  EXPECT_EQ(log_of(directory_ / "here")[9].at("lr"), 0.1);

  fs::rename(here("checkpoint.previous.memcnn"), here("checkpoint.memcnn"));
  const auto shorter = run(19); // of 20, of which 18 are done
  EXPECT_EQ(shorter.exit_code, 0) << shorter.err;
  EXPECT_THAT(
      shorter.out, HasSubstr("training for 19 iterations instead of 20: "));
  EXPECT_EQ(earlier(), json({6, 9, 20}));
}

TEST_F(SurvivingRun, PrintsItsNextStepAtOnce) {
  const std::string run =
      "resnet32 synthetic --results-dir here --log-every 10 --batch-size 4 "
      "--test-images 8 --threads 1 --no-cuda --iterations ";
  ASSERT_EQ(train(run + "12").exit_code, 0);
  const auto second = train(run + "14");
  EXPECT_EQ(rows(second.out).size(), 3U) << second.out;
  EXPECT_THAT(rows(second.out)[0], StartsWith("iteration:13 loss:"));
}

TEST_F(SurvivingRun, SaysThatItOverwritesALogWithoutACheckpoint) {
  fs::create_directories(directory_ / "here");
  write(here("log.jsonl"), "{\"iteration\":1}\n"); // of a run soon killed
  const auto result = train(six_steps());
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(
      result.err,
      "memcnn_train: warning: the log here/log.jsonl has rows of a run without "
      "a checkpoint, and begins anew\n");
  EXPECT_EQ(log_of(directory_ / "here").size(), 6U);

  fs::remove(here("checkpoint.memcnn"));
  fs::remove(here("checkpoint.previous.memcnn"));
  const auto log = read(here("log.jsonl"));
  expect_error(
      train(six_steps()),
      "expected the checkpoint here/checkpoint.memcnn to be there, since "
      "here/results.json is, but there is none. Give --fresh to overwrite the "
      "run that is done, or another --results-dir.");
  EXPECT_EQ(read(here("log.jsonl")), log);
  EXPECT_TRUE(fs::exists(here("results.json")));
  fs::remove(here("log.jsonl"));
  EXPECT_EQ(train(six_steps()).exit_code, 1) << "results without a log";
  EXPECT_TRUE(fs::exists(here("results.json")));
  const auto fresh = train(six_steps() + " --fresh");
  EXPECT_EQ(fresh.exit_code, 0);
  EXPECT_EQ(fresh.err, "");
}

TEST_F(SurvivingRun, GoesBackToThePreviousCheckpointOnlyIfAsked) {
  const auto whole = train(six_steps());
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const auto log = log_of(directory_ / "here");
  auto damaged = read(here("checkpoint.memcnn"));
  damaged[damaged.size() / 2] ^= 1;
  write(here("checkpoint.memcnn"), damaged);
  const auto refused = train(six_steps());
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_TRUE(std::regex_match(
      refused.err,
      std::regex(
          "memcnn_train: expected here/checkpoint\\.memcnn to be a checkpoint "
          "of this program, but it has checksum [0-9a-f]{8} instead of "
          "[0-9a-f]{8}: it is damaged\\. Give "
          "--from-previous to go on from here/checkpoint\\.previous"
          "\\.memcnn, or --fresh to start anew\\.\n")))
      << refused.err;
  EXPECT_EQ(read(here("checkpoint.memcnn")), damaged);

  const auto second = train(six_steps() + " --from-previous");
  EXPECT_EQ(second.exit_code, 0) << second.err;
  EXPECT_THAT(
      second.out,
      StartsWith(
          "going on from here/checkpoint.previous.memcnn at iteration 3\n"));
  EXPECT_EQ(log_of(directory_ / "here"), log);
  EXPECT_EQ(rows(second.out).size(), 4U);
}

TEST_F(SurvivingRun, SaysWhichStepsItGivesUpForThePreviousCheckpoint) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto again = train(six_steps() + " --from-previous");
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_EQ(
      again.err,
      "memcnn_train: warning: the checkpoint here/checkpoint.memcnn is whole, "
      "but --from-previous gives up what it has of iteration 6\n");
}

TEST_F(SurvivingRun, RefusesWhatIsNoCheckpoint) {
  fs::create_directories(directory_ / "here");
  const auto expect_refused = [&](const std::string& bytes,
                                  const std::string& message) {
    write(here("checkpoint.memcnn"), bytes);
    expect_error(train(six_steps()), message);
    EXPECT_EQ(read(here("checkpoint.memcnn")), bytes);
  };
  const std::string otherwise =
      " Give --fresh to overwrite it, or another --results-dir.";
  for (const std::string bytes :
       {"",
        "a text of mine\n",
        "PK\x03\x04 an archive",
        "memcnn-checkpoint two\n"}) {
    expect_refused(
        bytes,
        "expected here/checkpoint.memcnn to be a checkpoint of this program, "
        "but it is something else or damaged." +
            otherwise);
  }
  const std::string expected =
      "expected here/checkpoint.memcnn to be a checkpoint of this program, but ";
  expect_refused(
      "memcnn-checkpoint 3 9 01234567\nshort",
      expected + "it has 5 bytes instead of 9: it is damaged." + otherwise);
  expect_refused(
      "memcnn-checkpoint 3 5 01234567\nshort",
      expected +
          "it has checksum 8f2890a2 instead of 01234567: it is damaged." +
          otherwise);
  expect_refused(
      "memcnn-checkpoint 3 5 8f2890a2\nshort",
      expected + "it is no zip archive, or is cut off." + otherwise);
  expect_refused(
      "memcnn-checkpoint 1 whatever comes\n",
      expected +
          "it has format 1 instead of 3: the version of memcnn_train that "
          "wrote it goes on from it." +
          otherwise);
  fs::remove(here("checkpoint.memcnn"));
  expect_error(
      train(six_steps() + " --from-previous"),
      "expected the checkpoint here/checkpoint.previous.memcnn to be readable, "
      "but reading it failed: No such file or directory." +
          otherwise);
  expect_error(
      train(six_steps() + " --from-previous --fresh"),
      "expected a valid command line, but got: --fresh excludes "
      "--from-previous. See memcnn_train --help.");
}

TEST_F(SurvivingRun, RefusesALogThatItsCheckpointDoesNotKnow) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto whole = read(here("log.jsonl"));
  const auto checkpoint = read(here("checkpoint.memcnn"));
  const auto expect_refused = [&](const std::string& log) {
    write(here("log.jsonl"), log);
    const auto refused = train(six_steps());
    EXPECT_EQ(refused.exit_code, 1);
    EXPECT_TRUE(std::regex_match(
        refused.err,
        std::regex(
            "memcnn_train: expected the log here/log\\.jsonl to begin with "
            "the " +
            std::to_string(whole.size()) +
            " bytes with checksum [0-9a-f]{8} that the checkpoint "
            "here/checkpoint\\.memcnn knows of, but got " +
            std::to_string(log.size()) +
            " with [0-9a-f]{8}: it is damaged\\. Restore it, delete it to go "
            "on without these rows, or give --fresh to start anew\\.\n")))
        << refused.err;
    EXPECT_EQ(read(here("log.jsonl")), log);
    EXPECT_EQ(read(here("checkpoint.memcnn")), checkpoint);
    EXPECT_TRUE(fs::exists(here("results.json")));
  };
  expect_refused(whole.substr(0, whole.size() - 1));
  auto damaged = whole;
  damaged[damaged.size() / 2] ^= 1;
  expect_refused(damaged);

  write(here("log.jsonl"), whole + "{\"iteration\": 7"); // of a killed run
  EXPECT_EQ(train(six_steps()).exit_code, 0);
  EXPECT_EQ(read(here("log.jsonl")), whole);
}

TEST_F(SurvivingRun, BeginsItsLogAnewWhereItIsGone) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  auto log = log_of(directory_ / "here");
  log.erase(log.begin(), log.begin() + 3);
  go_back_to_the_third_step();
  fs::remove(here("log.jsonl"));
  const auto second = train(six_steps());
  EXPECT_EQ(second.exit_code, 0);
  EXPECT_EQ(
      second.err,
      "memcnn_train: warning: the log here/log.jsonl is gone, and begins anew "
      "after iteration 3\n");
  EXPECT_EQ(log_of(directory_ / "here"), log);
  EXPECT_EQ(train(six_steps()).exit_code, 0); // its mark is of the new log
}

TEST_F(SurvivingRun, KeepsTheLastCheckpointWhereTheDiskIsFull) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto log = log_of(directory_ / "here");
  go_back_to_the_third_step();
  const auto before = read(here("checkpoint.memcnn"));
  // No file may grow over 1000 blocks of 512 bytes.
  const auto full =
      train_shell("(ulimit -f 1000; exec $TRAIN " + six_steps() + ")");
  EXPECT_EQ(full.exit_code, 1);
  EXPECT_EQ(
      full.err,
      "memcnn_train: expected here/checkpoint.memcnn to be writable, but "
      "writing it failed: File too large. Make room on the disk, or give "
      "another --results-dir.\n");
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
  EXPECT_FALSE(fs::exists(here("checkpoint.memcnn.memcnn-partial")));
  EXPECT_EQ(train(six_steps()).exit_code, 0);
  EXPECT_EQ(log_of(directory_ / "here"), log);
}

TEST_F(SurvivingRun, LeavesADirectoryThatAnotherRunUses) {
  ASSERT_EQ(train(six_steps()).exit_code, 0);
  const auto log = read(here("log.jsonl"));
  const int lock = ::open(here("lock").c_str(), O_RDWR);
  ASSERT_EQ(::flock(lock, LOCK_EX), 0);
  expect_error(
      train(six_steps() + " --fresh"),
      "expected the results directory here to be free, but another run is "
      "using it. Wait for its end, or give another --results-dir.");
  ::close(lock);
  EXPECT_EQ(read(here("log.jsonl")), log);
  EXPECT_EQ(train(six_steps()).exit_code, 0);
}

TEST_F(SurvivingRun, NoticesADataFileThatChanges) {
  write_cifar("cifar100", directory_);
  const std::string run =
      brief("resnet32 cifar100 --iterations 1 --data-dir . --results-dir here");
  const auto first = train(run);
  ASSERT_EQ(first.exit_code, 0) << first.err;
  const auto before = read(here("checkpoint.memcnn"));
  std::fstream file(
      directory_ / "test.bin", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(30740000 - 1) << '\x01';
  file.close();
  const auto second = train(run);
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_TRUE(std::regex_match(
      second.err,
      std::regex("memcnn_train: expected the images of cifar100 to be those "
                 "that the checkpoint here/checkpoint\\.memcnn was trained on "
                 "\\(checksum [0-9a-f]{8}\\), but got others "
                 "\\([0-9a-f]{8}\\): a data file has changed\\. Restore it, "
                 "or give --fresh to start anew\\.\n")))
      << second.err;
  EXPECT_EQ(read(here("checkpoint.memcnn")), before);
}

} // namespace
