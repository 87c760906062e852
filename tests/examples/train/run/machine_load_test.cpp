// SPDX-License-Identifier: MIT

#include "train/run/machine_load.h"

#include <gtest/gtest.h>

#include <sstream>

namespace {

using training::hint_on_load;
using training::load_of_others;

TEST(MachineLoad, IsThatOfOtherProgramsNow) {
  const auto load = [](const char* text) {
    return load_of_others(std::istringstream(text));
  };
  EXPECT_EQ(load("1.25 0.80 0.60 4/142 7133\n"), 1.25);
  EXPECT_EQ(load("1.97 0.80 0.60 1/142 7133\n"), 0); // of a run that has ended
  EXPECT_FALSE(load(""));
  EXPECT_FALSE(load("1.97 0.80 0.60"));
}

TEST(MachineLoad, IsHintedAtWhereThreadsAreMoreThanIdleCores) {
  EXPECT_EQ(
      hint_on_load(/*load=*/1.04, /*cores=*/2, /*threads=*/2),
      "load 1.0 of other programs on 2 cores: try OMP_WAIT_POLICY=passive, or "
      "fewer --threads");
  EXPECT_FALSE(hint_on_load(/*load=*/0.2, /*cores=*/2, /*threads=*/2));
  EXPECT_FALSE(hint_on_load(/*load=*/1, /*cores=*/4, /*threads=*/2));
}

TEST(MachineLoad, DoesNotMatterToOneThread) {
  EXPECT_FALSE(hint_on_load(/*load=*/9, /*cores=*/2, /*threads=*/1));
}

} // namespace
