// SPDX-License-Identifier: MIT

#define REVNET_NO_CUDA // as if LibTorch were one without CUDA
#include "revnet/captured_step.h"
#include "revnet/fused_sgd.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <vector>

namespace {

TEST(CapturedStep, TrainsWithoutCuda) {
  EXPECT_FALSE(revnet::kHasCudaGraphs);
  const auto weight = torch::ones({1}).requires_grad_();
  revnet::FusedSgd optimizer({weight}, 0.25);
  revnet::CapturedStep step(
      torch::kCPU,
      [&](const auto&) {
        optimizer.zero_grad();
        weight.square().sum().backward();
        optimizer.step();
        return std::vector<torch::Tensor>{weight};
      },
      revnet::CapturedStepOptions().warm_up(1));
  for (const double expected : {0.5, 0.25, 0.125}) {
    EXPECT_EQ(step()[0].item<double>(), expected);
  }
  optimizer.set_lr(0.5);
  EXPECT_EQ(step()[0].item<double>(), 0);
  EXPECT_FALSE(step.is_captured());
  EXPECT_EQ(step.graph_bytes(), 0);
}

} // namespace
