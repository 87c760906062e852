// SPDX-License-Identifier: MIT

// memcnn_train where nobody reads what it prints.

#include "support/train_program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <csignal>
#include <filesystem>
#include <sstream>
#include <string>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::Result;
using nlohmann::json;
using testing::HasSubstr;
using testing::MatchesRegex;

class StreamsOfARun : public memcnn_test::TrainProgramTest {
 protected:
  static std::string steps(int count) {
    return brief(
        "resnet32 synthetic --results-dir here --iterations " +
        std::to_string(count));
  }

  /// Prints what a run is, but not much more: into a file that must not grow
  /// over a size that no other file of the run has.
  Result train_with_little_room(const std::string& arguments) {
    constexpr int kMost = 100 << 20;
    constexpr int kRoom = 350;
    return train_shell(
        "(truncate -s " + std::to_string(kMost - kRoom) + " rows; ulimit -f " +
        std::to_string(kMost / 512) + "; $TRAIN " + arguments + " >> rows)");
  }

  /// What a run that cannot print says first.
  void expect_lost_output(
      const Result& result,
      const std::string& why,
      const std::string& then) {
    EXPECT_EQ(result.exit_code, 128 + SIGPIPE);
    EXPECT_EQ(
        result.err,
        "memcnn_train: expected stdout to be writable, but writing it failed: " +
            why + ". " + then + "\n");
  }
};

TEST_F(StreamsOfARun, PrintIntoNoFileWhereTheyAreClosed) {
  for (const std::string closed :
       {"<&- >&- 2>&-", ">&-", "<&- 2>&-", ">&- 2>&-"}) {
    SCOPED_TRACE(closed);
    const auto result =
        train_shell("$TRAIN " + steps(3) + " --fresh " + closed);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    int rows = 0;
    std::istringstream log(read(here("log.jsonl")));
    for (std::string line; std::getline(log, line); ++rows) {
      EXPECT_TRUE(json::accept(line)) << line;
    }
    EXPECT_EQ(rows, 3);
    EXPECT_EQ(read(here("lock")), "");
  }
}

TEST_F(StreamsOfARun, StopItWithACheckpointWhereNobodyReads) {
  const auto result = train_shell(
      "{ $TRAIN " + steps(100000) +
      "; echo $? > code; } | sed '/^iteration:/q' > read");
  EXPECT_EQ(read(directory_ / "code"), std::to_string(128 + SIGPIPE) + "\n");
  EXPECT_THAT(
      result.err,
      MatchesRegex(
          "memcnn_train: expected stdout to be writable, but writing it "
          "failed: Broken pipe\\. The run stopped at iteration [0-9]+; the "
          "same command without --fresh goes on from there\\.\n"));
  EXPECT_TRUE(fs::exists(here("checkpoint.memcnn")));
  EXPECT_FALSE(fs::exists(here("results.json")));
}

TEST_F(StreamsOfARun, StopItWithACheckpointWhereTheDiskIsFull) {
  expect_lost_output(
      train_with_little_room(steps(100000)),
      "File too large",
      "The run stopped at iteration 1; the same command without --fresh goes on "
      "from there.");
  EXPECT_TRUE(fs::exists(here("checkpoint.memcnn")));
  fs::copy(here("checkpoint.memcnn"), here("checkpoint.previous.memcnn"));
  const auto again =
      train_shell("$TRAIN " + steps(100000) + " --from-previous > /dev/full");
  EXPECT_THAT(
      again.err,
      HasSubstr("the same command without --from-previous goes on from "
                "there.\n"));
}

TEST_F(StreamsOfARun, StopItBeforeItsFirstStepWhereNothingCanBePrinted) {
  expect_lost_output(
      train_shell("$TRAIN " + steps(100000) + " > /dev/full"),
      "No space left on device",
      "The run stopped at iteration 0; the same command without --fresh goes on "
      "from there.");
  EXPECT_FALSE(fs::exists(here("checkpoint.memcnn")));
}

TEST_F(StreamsOfARun, SayWhereTheEndOfARunIsNotPrinted) {
  expect_lost_output(
      train_with_little_room(steps(0)),
      "File too large",
      "The run is done, and all its files are written.");
  EXPECT_TRUE(fs::exists(here("results.json")));
}

} // namespace
