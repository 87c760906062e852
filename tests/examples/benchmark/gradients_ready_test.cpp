// SPDX-License-Identifier: MIT

// memcnn_gradients_ready as its users meet it.

#include "support/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

class GradientsReadyProgram : public memcnn_test::ProgramTest {
 protected:
  memcnn_test::Result run(const std::string& arguments) {
    return shell("'" MEMCNN_GRADIENTS_READY "' " + arguments);
  }
};

TEST_F(GradientsReadyProgram, PrintsARowForEachEngine) {
  const auto result =
      run("--depth 2 --channels 2 --batch 2 --size 4 --engines plain,sequence");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(
      result.out,
      AllOf(
          StartsWith("2 couplings of 2 x 2 channels, batch 2, 4 x 4, cpu: "),
          HasSubstr("\nplain "),
          HasSubstr("\nsequence ")));
}

TEST_F(GradientsReadyProgram, RejectsAnUnknownEngine) {
  const auto result = run("--engines plane");
  EXPECT_NE(result.exit_code, 0);
  EXPECT_THAT(result.err, HasSubstr("plane"));
}

} // namespace
