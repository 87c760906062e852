// SPDX-License-Identifier: MIT

#include "support/nearest.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace {

using support::did_you_mean;
using support::edit_distance;
using support::nearest;

TEST(EditDistance, CountsWhatHasToBeChanged) {
  EXPECT_EQ(edit_distance("", ""), 0U);
  EXPECT_EQ(edit_distance("seed", "seed"), 0U);
  EXPECT_EQ(edit_distance("", "seed"), 4U);
  EXPECT_EQ(edit_distance("seed", ""), 4U);
  EXPECT_EQ(edit_distance("sed", "seed"), 1U);
  EXPECT_EQ(edit_distance("seeds", "seed"), 1U);
  EXPECT_EQ(edit_distance("feed", "seed"), 1U);
  EXPECT_EQ(edit_distance("sede", "seed"), 1U);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3U);
  EXPECT_EQ(edit_distance("ca", "abc"), 3U); // once in one place
}

TEST(Nearest, FindsWhatWasMeant) {
  const std::vector<std::string> flags = {
      "--no-cuda", "--seed", "--batch-size", "--log-every", "--evaluate-every"};
  EXPECT_EQ(nearest("--batchsize", flags), "--batch-size");
  EXPECT_EQ(nearest("--batch_size", flags), "--batch-size");
  EXPECT_EQ(nearest("--sede", flags), "--seed");
  EXPECT_EQ(nearest("--batch", flags), "--batch-size");
  EXPECT_EQ(nearest("--evaluate", flags), "--evaluate-every");
  EXPECT_EQ(nearest("--depth", flags), "");
  EXPECT_EQ(nearest("-x", flags), "");
  EXPECT_EQ(nearest("", flags), "");
  EXPECT_EQ(nearest("--seed", {}), "");
}

TEST(Nearest, DoesNotLookAtCase) {
  const std::vector<std::string> sets = {"cifar10", "cifar100"};
  EXPECT_EQ(nearest("CIFAR10", sets), "cifar10");
  EXPECT_EQ(nearest("CIFAR-100", sets), "cifar100");
  EXPECT_EQ(nearest("--dataset", {"--data-dir", "DATASET"}), "DATASET");
}

TEST(Nearest, IsTheFirstOfEquals) {
  EXPECT_EQ(nearest("cifar1", {"cifar10", "cifar100"}), "cifar10");
  EXPECT_EQ(nearest("resnet3", {"resnet32", "revnet38"}), "resnet32");
}

TEST(Nearest, IsAskedForInAMessage) {
  EXPECT_EQ(did_you_mean("sead", {"seed"}), " (did you mean seed?)");
  EXPECT_EQ(did_you_mean("depth", {"seed"}), "");
}

} // namespace
