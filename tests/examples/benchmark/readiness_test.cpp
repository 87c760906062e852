// SPDX-License-Identifier: MIT

#include "benchmark/readiness.h"

#include "benchmark/config.h"
#include "benchmark/engines.h"
#include "benchmark/network.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <string>

namespace {

using benchmark::Readiness;

/// A trunk of blocks that are all alike.
benchmark::Config uniform() {
  benchmark::Config config;
  config.depth = 32;
  config.channels = 4;
  return config;
}

class ReadinessOf : public testing::TestWithParam<std::string> {
 protected:
  ReadinessOf() {
    torch::manual_seed(0);
    network_ =
        std::make_shared<benchmark::Network<benchmark::Additive>>(uniform());
    image_ = torch::randn({2, 3, 6, 6});
  }

  Readiness of(const std::string& engine) {
    benchmark::ReadinessMeter meter(*network_);
    return meter.measure(
        make_engine(engine, uniform(), network_, /*budget_bytes=*/30000),
        image_);
  }

  std::shared_ptr<benchmark::Network<benchmark::Additive>> network_;
  torch::Tensor image_;
};

TEST_P(ReadinessOf, CountsEveryBranchAndParameterOnce) {
  const Readiness found = of(GetParam());
  EXPECT_EQ(found.branches, 2 * uniform().depth);
  EXPECT_EQ(found.gradients.size(), network_->parameters().size());
  EXPECT_EQ(found.branches_at(1), 1);
}

TEST_P(ReadinessOf, GradientsComeAsEarlyAsPlainAutograds) {
  const Readiness plain = of("plain");
  const Readiness found = of(GetParam());
  for (const double share : {0.25, 0.5, 0.75, 0.9}) {
    EXPECT_LE(found.branches_at(share), plain.branches_at(share) + 0.05)
        << share;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Engines,
    ReadinessOf,
    testing::Values(
        "plain",
        "checkpoint",
        "wrapper",
        "sequence",
        "sequence-budget"),
    [](const auto& engine) {
      std::string name = engine.param;
      name.erase(std::remove(name.begin(), name.end(), '-'), name.end());
      return name;
    });

TEST(Readiness, SharesAreOfBytesAndBranches) {
  const Readiness readiness{{{10, 1}, {80, 3}, {10, 4}}, 4};
  EXPECT_EQ(readiness.branches_at(0.1), 0.25);
  EXPECT_EQ(readiness.branches_at(0.5), 0.75);
  EXPECT_EQ(readiness.branches_at(0.9), 0.75);
  EXPECT_EQ(readiness.branches_at(1), 1);
}

} // namespace
