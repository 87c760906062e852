// SPDX-License-Identifier: MIT

#include "train/run/machine_load.h"

#include <gtest/gtest.h>

namespace {

using training::hint_on_load;

TEST(MachineLoad, IsHintedAtWhereThreadsAreMoreThanIdleCores) {
  EXPECT_EQ(
      hint_on_load(/*load=*/1.04, /*cores=*/2, /*threads=*/2),
      "load 1.0 on 2 cores: try OMP_WAIT_POLICY=passive, or fewer --threads");
  EXPECT_FALSE(hint_on_load(/*load=*/0.2, /*cores=*/2, /*threads=*/2));
  EXPECT_FALSE(hint_on_load(/*load=*/1, /*cores=*/4, /*threads=*/2));
}

TEST(MachineLoad, DoesNotMatterToOneThread) {
  EXPECT_FALSE(hint_on_load(/*load=*/9, /*cores=*/2, /*threads=*/1));
}

} // namespace
