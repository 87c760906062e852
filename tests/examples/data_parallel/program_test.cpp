// SPDX-License-Identifier: MIT

// The program of examples/data_parallel as its users meet it, and torchrun.

#include "support/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace {

const std::string kPython = "'" MEMCNN_PYTHON_WITH_TORCH "'";

class DataParallelProgram : public memcnn_test::ProgramTest {
 protected:
  void SetUp() override {
    ProgramTest::SetUp();
    const std::string has_torch =
        " -c 'import importlib.util as u; exit(u.find_spec(\"torch\") is None)'";
    if (shell(kPython + has_torch).exit_code != 0) {
      GTEST_SKIP() << "there is no Python with torch, and so no torchrun";
    }
  }

  static std::string torchrun() {
    return "OMP_NUM_THREADS=1 timeout 200 " + kPython +
        " -m torch.distributed.run --standalone --no-python";
  }
};

TEST_F(DataParallelProgram, HasTheSameLossesInOneProcessAndInTwo) {
  // With threads, as where a user starts it; torchrun starts ranks with one.
  const auto one = shell("OMP_NUM_THREADS=2 '" DATA_PARALLEL "'");
  const auto two =
      shell(torchrun() + " --nproc-per-node 2 '" DATA_PARALLEL "'");
  EXPECT_EQ(one.exit_code, 0) << one.err;
  EXPECT_EQ(two.exit_code, 0) << two.err;
  EXPECT_THAT(one.out, testing::HasSubstr("step:20 loss:"));
  EXPECT_EQ(one.out, two.out);
}

TEST_F(DataParallelProgram, RejectsMoreProcessesThanParts) {
  const auto result =
      shell(torchrun() + " --nproc-per-node 3 '" DATA_PARALLEL "'");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(
      result.err,
      testing::HasSubstr(
          "data_parallel: expected a number of processes that divides the 2 "
          "parts of a batch, but got 3. Start torchrun with --nproc-per-node "
          "2.\n"));
}

/// The ranks of world_test.cpp, of which one dies twice.
TEST_F(DataParallelProgram, MeetsAgainAfterRestarts) {
  const auto result = shell(
      torchrun() +
      " --nproc-per-node 2 --max-restarts 2 '" MEMCNN_RANK "' rank");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.out, "attempt 2 sum 2\nattempt 2 sum 2\n") << result.err;
}

} // namespace
