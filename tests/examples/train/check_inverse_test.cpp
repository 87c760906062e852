// SPDX-License-Identifier: MIT

// memcnn_train --check-inverse, and where NaN comes from, as users meet them.

#include "support/train_program.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using memcnn_test::read;
using nlohmann::json;

class CheckInverse : public memcnn_test::TrainProgramTest {
 protected:
  std::vector<json> log_of(const std::string& results) const {
    std::vector<json> rows;
    std::istringstream lines(read(directory_ / results / "log.jsonl"));
    for (std::string line; std::getline(lines, line);) {
      rows.push_back(json::parse(line));
    }
    return rows;
  }
};

const std::vector<std::string>& fields() {
  static const std::vector<std::string> all{
      "inverse_error",
      "inverse_error_block",
      "gradient_deviation",
      "gradient_deviation_parameter",
      "inverse_errors"};
  return all;
}

TEST_F(CheckInverse, LeavesNoTraceInTheRun) {
  const std::string run = "revnet38 synthetic --iterations 5 ";
  for (const std::string options :
       {"", "--engine wrapper", "--memory-budget 1"}) {
    const auto without =
        short_run(run + options + " --fresh --results-dir without");
    const auto with = short_run(
        run + options + " --fresh --results-dir with --check-inverse 2");
    ASSERT_EQ(without.exit_code, 0) << without.err;
    ASSERT_EQ(with.exit_code, 0) << with.err;
    EXPECT_EQ(with.err, "");

    auto expected = log_of("without");
    auto found = log_of("with");
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      for (const auto& field : fields()) {
        EXPECT_EQ(found[i].erase(field), i % 2) << i << field;
      }
      for (const char* time : {"ms_per_step", "data_ms_per_step"}) {
        found[i].erase(time);
        expected[i].erase(time);
      }
      EXPECT_EQ(found[i], expected[i]); // losses and bytes, all digits
    }
    const auto results = [&](const char* directory) {
      auto values = json::parse(read(directory_ / directory / "results.json"));
      values.at("step").erase("median_ms_per_step");
      return values;
    };
    EXPECT_EQ(results("with"), results("without"));
  }
}

TEST_F(CheckInverse, PrintsAndLogsWhatItFinds) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 2 --check-inverse 2 --results-dir here");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const std::string number = "[0-9.]+e-[0-9]+";
  EXPECT_TRUE(std::regex_search(
      result.out,
      std::regex(
          "\niteration:2 inverse_error:" + number +
          " inverse_error_block:trunk\\.[024]\\.blocks\\.[0-2] "
          "gradient_deviation:" +
          number + " gradient_deviation_parameter:[a-zA-Z0-9.]+\n")))
      << result.out;

  const json row = log_of("here").at(1);
  const auto& blocks = row.at("inverse_errors");
  ASSERT_EQ(blocks.size(), 7U);
  EXPECT_EQ(blocks[0].at("block"), "trunk.0.blocks.0");
  EXPECT_EQ(blocks[6].at("block"), "trunk.4.blocks.1");
  double largest = 0;
  for (const auto& block : blocks) {
    largest = std::max(largest, block.at("error").get<double>());
  }
  EXPECT_EQ(row.at("inverse_error"), largest);
  EXPECT_LT(row.at("inverse_error"), 1e-4);
  EXPECT_LT(row.at("gradient_deviation"), 1e-2);
}

TEST_F(CheckInverse, FindsNothingOffWithFractionalBits) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 1 --check-inverse 1 "
      "--fractional-bits 12 --results-dir here");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const json row = log_of("here").at(0);
  EXPECT_EQ(row.at("inverse_error"), 0);
  EXPECT_EQ(row.at("gradient_deviation"), 0);
}

TEST_F(CheckInverse, WarnsAndGoesOn) {
  const auto result = short_run(
      "revnet38 synthetic --iterations 2 --learning-rate 1e4 "
      "--check-inverse 1");
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_TRUE(std::regex_search(
      result.err,
      std::regex("^memcnn_train: warning: expected the rebuilt input of a "
                 "block to be off by at most 0\\.001 of its size, but got "
                 "[0-9.e+-]+ at trunk\\.[024]\\.blocks\\.[0-2] after iteration "
                 "1\\. Give --fractional-bits 14, with which blocks are undone "
                 "exactly, or a lower --learning-rate \\(now 10000\\)\\.\n")))
      << result.err;
}

TEST_F(CheckInverse, IsForReversibleNetworksOnly) {
  expect_error(
      train("resnet32 synthetic --check-inverse 2"),
      "expected MODEL to be one of revnet38, revnet110, revnet164 with "
      "--check-inverse, but got \"resnet32\", which is plain as it is.");
  expect_error(
      train("revnet38 synthetic --plain --check-inverse 2"),
      "expected a valid command line, but got: --plain excludes "
      "--check-inverse. See memcnn_train --help.");
  expect_error(
      train("revnet38 synthetic --check-inverse -1"),
      "expected a valid command line, but got: --check-inverse: Value -1 not "
      "in range 0 to 1000000000. See memcnn_train --help.");
}

TEST_F(CheckInverse, NanIsTracedToItsBlock) {
  for (const std::string model : {"resnet32", "revnet38"}) {
    const auto result =
        short_run(model + " synthetic --iterations 3 --learning-rate 1e30");
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_TRUE(std::regex_search(
        result.err,
        std::regex("expected the loss to be finite, but got -?(nan|inf) at "
                   "iteration 2\\. The first value that is not finite is in "
                   "the output of (stem|trunk\\.[a-z0-9.]+ \\((ResidualBlock|"
                   "AdditiveCoupling)\\)|head)\\. Give a lower ")))
        << result.err;
  }
}

} // namespace
