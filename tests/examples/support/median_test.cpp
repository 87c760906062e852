// SPDX-License-Identifier: MIT

#include "support/median.h"

#include <gtest/gtest.h>

namespace {

TEST(Median, IsTheValueInTheMiddle) {
  EXPECT_EQ(support::median({7}), 7);
  EXPECT_EQ(support::median({9, 1, 2}), 2);
}

TEST(Median, OfAnEvenNumberIsTheMeanOfTheTwoInTheMiddle) {
  EXPECT_EQ(support::median({4, 1}), 2.5);
  EXPECT_EQ(support::median({9, 1, 2, 4}), 3);
}

} // namespace
