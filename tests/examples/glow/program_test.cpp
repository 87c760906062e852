// SPDX-License-Identifier: MIT

// memcnn_glow as its users meet it: arguments in, text, files and exit code out.

#include "support/program.h"
#include "support/train_rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using memcnn_test::Result;
using memcnn_test::rows;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::SizeIs;
using testing::StartsWith;

class GlowProgram : public memcnn_test::ProgramTest {
 protected:
  /// A command of the shell in which $GLOW is the program.
  Result glow_shell(const std::string& command) {
    return shell("GLOW='" MEMCNN_GLOW "'; " + command);
  }

  Result glow(const std::string& arguments) {
    return glow_shell("$GLOW " + arguments);
  }

  /// Of a run of a second or two in `here`; every row shows one step.
  static std::string brief(
      const std::string& arguments,
      const std::string& folder = "here",
      int64_t steps = 1) {
    return "synthetic --levels 2 --width 4 --batch-size 4 --log-every 1 "
           "--test-images 8 --threads 1 --no-cuda --results-dir " +
        folder + " --steps " + std::to_string(steps) + " " + arguments;
  }

  void expect_error(const Result& result, const std::string& message) {
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_EQ(result.err, "memcnn_glow: " + message + "\n");
    EXPECT_THAT(rows(result.out), SizeIs(0)) << result.out;
    EXPECT_FALSE(fs::exists(directory_ / "results"));
  }

  json results() {
    return json::parse(read(directory_ / "here" / "results.json"));
  }

  std::vector<json> log() {
    std::vector<json> found;
    std::istringstream lines(read(directory_ / "here" / "log.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      found.push_back(json::parse(line));
    }
    return found;
  }
};

TEST_F(GlowProgram, ExplainsItself) {
  const auto help = glow("--help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(
      help.out,
      AllOf(
          HasSubstr("memcnn_glow [OPTIONS] DATASET"),
          HasSubstr("--anchor-every"),
          HasSubstr("--results-dir")));
  EXPECT_THAT(glow("--version").out, StartsWith("memcnn_glow "));
}

TEST_F(GlowProgram, WritesRowsSheetsAndResults) {
  const auto result =
      glow(brief("--iterations 4 --evaluate-every 2 --sample-every 2 "
                 "--compare-plain 1"));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_THAT(
      result.out,
      AllOf(
          HasSubstr("\niteration:2 test_bits_per_dim:"),
          HasSubstr("\nsamples: here/samples-000002.png\n"),
          HasSubstr("\nsamples: here/samples-000004.png\n"),
          HasSubstr("glow and its plain twin, 1 steps each"),
          HasSubstr("\nresults: here/results.json\n")));
  for (const char* name : {"samples-000002.png", "samples-000004.png"}) {
    EXPECT_THAT(read(directory_ / "here" / name), StartsWith("\x89PNG"));
  }
  const auto rows = log();
  ASSERT_THAT(rows, SizeIs(4));
  EXPECT_EQ(rows[1].at("samples"), "samples-000002.png");
  EXPECT_THAT(rows[1].at("drift"), SizeIs(2));
  EXPECT_GT(rows[3].at("held_bytes"), 0);
  EXPECT_FALSE(rows[3].contains("samples")); // the results have the last
  const auto found = results();
  EXPECT_EQ(found.at("samples"), "samples-000004.png");
  EXPECT_LT(found.at("reconstruction_error"), 1e-3);
  EXPECT_LT(found.at("test_bits_per_dim"), 9);
  EXPECT_LT(
      found.at("comparison").at("sequence").at("held_after_forward_bytes"),
      found.at("comparison").at("plain").at("held_after_forward_bytes"));
}

TEST_F(GlowProgram, GoesOnAsIfItHadNeverStopped) {
  const auto whole = glow(brief("--iterations 6", "whole"));
  const auto first = glow(brief("--iterations 3"));
  const auto rest = glow(brief("--iterations 6"));
  EXPECT_EQ(rest.exit_code, 0) << rest.err;
  EXPECT_THAT(
      rest.out,
      StartsWith("going on from here/checkpoint.memcnn at iteration 3\n"
                 "training for 6 iterations instead of 3\n"));
  auto expected = rows(whole.out);
  auto found = rows(rest.out);
  expected.erase(expected.begin(), expected.begin() + 3);
  EXPECT_EQ(found, expected);
  EXPECT_EQ(
      read(directory_ / "here" / "samples-000006.png"),
      read(directory_ / "whole" / "samples-000006.png"));
}

TEST_F(GlowProgram, FinishesTheStepThatAnInterruptMeets) {
  const auto result = glow_shell(
      "$GLOW " + brief("--iterations 100000") +
      " & until [ -s here/log.jsonl ]; do sleep 0.1; done; kill -INT $!; "
      "wait $!; exit $?");
  EXPECT_EQ(result.exit_code, 128 + 2);
  EXPECT_THAT(
      result.out,
      HasSubstr("; the same command without --fresh goes on from there\n"));
  EXPECT_TRUE(fs::exists(directory_ / "here" / "checkpoint.memcnn"));
  EXPECT_FALSE(fs::exists(directory_ / "here" / "results.json"));
}

TEST_F(GlowProgram, SavesWhatItsPlainTwinKeeps) {
  EXPECT_EQ(glow(brief("--iterations 2", "here", 6)).exit_code, 0);
  const auto saved = results();
  const auto plain = glow(brief("--iterations 2 --plain --fresh", "here", 6));
  EXPECT_EQ(plain.exit_code, 0) << plain.err;
  const std::string held = "held_after_forward_bytes";
  EXPECT_LT(
      4 * saved.at("step").at(held).get<int64_t>(),
      results().at("step").at(held).get<int64_t>());
}

TEST_F(GlowProgram, RejectsUnknownArguments) {
  expect_error(
      glow("mnist"),
      "expected a valid command line, but got: DATASET: mnist not in "
      "{cifar10,cifar100,synthetic}. See memcnn_glow --help.");
  expect_error(
      glow("synthetic --levels 6"),
      "expected a valid command line, but got: --levels: Value 6 not in range "
      "1 to 5. See memcnn_glow --help.");
  expect_error(
      glow("synthetic --learn-bits 9"),
      "expected a valid command line, but got: --learn-bits: Value 9 not in "
      "range 1 to 8. See memcnn_glow --help.");
  expect_error(
      glow("synthetic --parametrization LU"),
      "expected a valid command line, but got: --parametrization: LU not in "
      "{lu,orthogonal,plain} (did you mean lu?). See memcnn_glow --help.");
  EXPECT_THAT(
      glow("synthetic --depth 3").err,
      StartsWith("memcnn_glow: expected a known argument, but got "
                 "\"--depth\". There are "));
}

TEST_F(GlowProgram, RejectsAnEmptyFolder) {
  fs::create_directories(directory_ / "empty");
  const auto result = glow("cifar10 --data-dir empty");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      StartsWith("memcnn_glow: expected empty/data_batch_1.bin to be a file of "
                 "30730000 bytes, but there is none. Fetch it with "));
}

TEST_F(GlowProgram, RejectsFilesThatAreNoImages) {
  fs::create_directories(directory_ / "other");
  memcnn_test::write(directory_ / "other" / "data_batch_1.bin", "a text");
  const auto result = glow("cifar10 --data-dir other");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      StartsWith(
          "memcnn_glow: expected other/data_batch_1.bin to have 30730000 "
          "bytes, but it has 6: it is truncated, or another file. "));
}

TEST_F(GlowProgram, RejectsACheckpointOfAnotherFlow) {
  EXPECT_EQ(glow(brief("--iterations 1")).exit_code, 0);
  expect_error(
      glow(brief("--iterations 1", "here", 2)),
      "expected the checkpoint here/checkpoint.memcnn to be of a run with "
      "--steps 2, but it is of one with --steps 1. Give --fresh to overwrite "
      "it, or another --results-dir.");
}

TEST_F(GlowProgram, SaysWhereALossIsNotFinite) {
  const auto result =
      glow(brief("--iterations 9 --warm-up 0 --learning-rate 1e30"));
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      AllOf(
          StartsWith("memcnn_glow: expected the loss to be finite, but got "),
          HasSubstr("Give a lower --learning-rate (now 1e+30), or a longer "
                    "--warm-up (now 0).\n")));
  EXPECT_FALSE(fs::exists(directory_ / "here" / "checkpoint.memcnn"));
}

} // namespace
