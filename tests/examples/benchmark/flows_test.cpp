// SPDX-License-Identifier: MIT

// memcnn_flows and memcnn_flow_drift as their users meet them.

#include "support/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <sstream>
#include <string>
#include <vector>

namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

const std::string kSmall =
    "--levels 2 --width 4 --batch 2 --size 8 --threads 1 ";

class FlowsProgram : public memcnn_test::ProgramTest {
 protected:
  memcnn_test::Result flows(const std::string& arguments) {
    return shell("'" MEMCNN_FLOWS "' " + arguments);
  }

  memcnn_test::Result drift(const std::string& arguments) {
    return shell("'" MEMCNN_FLOW_DRIFT "' " + arguments);
  }

  static std::vector<nlohmann::json> lines_of(
      const memcnn_test::Result& result) {
    EXPECT_EQ(result.exit_code, 0) << result.err;
    std::vector<nlohmann::json> lines;
    std::istringstream out(result.out);
    for (std::string line; std::getline(out, line);) {
      lines.push_back(nlohmann::json::parse(line));
    }
    return lines;
  }
};

TEST_F(FlowsProgram, PrintsARowForEachEngineAndDepth) {
  const auto result =
      flows(kSmall + "--depth 1,2 --anchor-every 0,2 --steps 1 --warmup 0");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(
          StartsWith("Glow of 2 levels, width 4, 1x1 lu; batch 2, 3 x 8 x 8, "),
          HasSubstr("\nplain "),
          HasSubstr("\nsaving "),
          HasSubstr("\nsaving, anchors 2 "),
          HasSubstr("to plain")));
}

TEST_F(FlowsProgram, MemoryAloneHasNoTimes) {
  const auto result = flows(kSmall + "--depth 1 --steps 0");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, testing::Not(HasSubstr(" ms")));
}

TEST_F(FlowsProgram, HeldMemoryDoesNotDependOnDepth) {
  const auto lines = lines_of(flows(
      kSmall + "--depth 2,9 --engines saving --steps 0 --log-det --json"));
  ASSERT_EQ(lines.size(), 2);
  EXPECT_EQ(lines[0]["saved_bytes"], lines[1]["saved_bytes"]);
  for (const auto& line : lines) {
    EXPECT_EQ(line["log_det_bytes"], 4 * 2); // one float32 a sample
    EXPECT_EQ(line["left_bytes"], line["parameter_bytes"]);
  }
}

TEST_F(FlowsProgram, RejectsASizeThatLevelsDoNotHalve) {
  const auto result = flows("--levels 3 --size 12");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      HasSubstr("expected --size of a multiple of 8 for --levels 3"));
}

TEST_F(FlowsProgram, DriftRejectsASizeThatIsOdd) {
  const auto result = drift("--size 5");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.err, HasSubstr("expected an even --size"));
}

TEST_F(FlowsProgram, RejectsAnUnknownEngine) {
  const auto result = flows("--engines plane");
  EXPECT_NE(result.exit_code, 0);
  EXPECT_THAT(result.err, HasSubstr("plane"));
}

const std::string kShort =
    "--depth 3 --channels 2 --width 4 --batch 2 --size 4 --threads 1 ";

TEST_F(FlowsProgram, DriftHasARowForEachMatrix) {
  const auto result = drift(kShort + "--matrix plain,orthogonal --sigma 0,0.1");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(
          HasSubstr("\nplain        0.00 "),
          HasSubstr("\nplain        0.10 "),
          HasSubstr("\northogonal   0.00 "),
          testing::Not(HasSubstr("\northogonal   0.10 "))));
}

TEST_F(FlowsProgram, DriftIsAnErrorOfEachAnchoring) {
  const auto lines =
      lines_of(drift(kShort + "--sigma 0.05 --anchor-every 0,3 --json"));
  ASSERT_EQ(lines.size(), 1);
  EXPECT_GT(lines[0]["condition"], 1);
  EXPECT_LT(lines[0]["round_trip_error"], 1e-4);
  for (const std::string name : {"plain", "0", "3"}) {
    EXPECT_LT(lines[0]["gradient_errors"][name], 1e-2) << name;
  }
}

} // namespace
