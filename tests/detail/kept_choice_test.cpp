// SPDX-License-Identifier: MIT

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/kept_choice.h>

#include <cstdint>
#include <string>

namespace memcnn_test {
namespace {

using memcnn::detail::KeptChoice;

/// Candidates that say in a string when they are given up.
class KeptChoiceOfLetters : public testing::Test {
 protected:
  KeptChoice::Rank
  add(char letter, double worth, int64_t bytes, size_t position = 0) {
    return choice_.add(worth, bytes, position, [this, letter, bytes] {
      given_up_ += letter;
      return bytes;
    });
  }

  KeptChoice choice_{/*budget=*/100};
  std::string given_up_;
};

TEST_F(KeptChoiceOfLetters, KeepsAllThatFits) {
  add('a', 1, 60);
  add('b', 2, 40);
  choice_.make_room();
  EXPECT_EQ(given_up_, "");
  EXPECT_EQ(choice_.bytes(), 100);
}

TEST_F(KeptChoiceOfLetters, GivesUpTheLeastWorthAByteFirst) {
  add('a', 5, 60);
  add('b', 1, 60);
  add('c', 9, 60);
  choice_.make_room();
  EXPECT_EQ(given_up_, "ba");
  EXPECT_EQ(choice_.bytes(), 60);
}

TEST_F(KeptChoiceOfLetters, OfTheSameWorthTheLastPositionIsKept) {
  add('c', 3, 60, 2);
  add('a', 3.1, 60, 0); // about the same: an allocator's whim
  add('b', 3, 60, 1);
  choice_.make_room();
  EXPECT_EQ(given_up_, "ab");
}

TEST_F(KeptChoiceOfLetters, WhatIsWorthNothingGoesBeforeAllElse) {
  add('a', 1e-3, 60);
  add('b', 0, 60);
  choice_.make_room();
  EXPECT_EQ(given_up_, "b");
}

TEST_F(KeptChoiceOfLetters, GivesUpWhatItIsTold) {
  const auto rank = add('a', 9, 60);
  add('b', 1, 60);
  choice_.give_up(rank);
  choice_.give_up(rank); // once
  choice_.make_room();
  EXPECT_EQ(given_up_, "a");
  EXPECT_EQ(choice_.bytes(), 60);
}

TEST_F(KeptChoiceOfLetters, OneThatGivesWayMayLeaveOthers) {
  choice_.add(1, 120, 0, [this] {
    add('b', 2, 80);
    add('c', 5, 40);
    return 120;
  });
  choice_.make_room();
  EXPECT_EQ(given_up_, "b");
  EXPECT_EQ(choice_.bytes(), 40);
}

} // namespace
} // namespace memcnn_test
