// SPDX-License-Identifier: MIT

#include "revnet/step_in_backward.h"

#include "support/modules.h"
#include "support/throws_error.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/allocation_meter.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace {

using memcnn_test::all_equal;
using memcnn_test::Chain;
using memcnn_test::Coupling;
using memcnn_test::Engine;
using memcnn_test::ThrowsError;
using revnet::StepInBackward;
using testing::HasSubstr;
using testing::StartsWith;
using torch::Tensor;
using Optimizer = torch::optim::Optimizer;
using Groups = std::vector<torch::optim::OptimizerParamGroup>;
using MakeOptimizer = std::function<std::unique_ptr<Optimizer>(const Groups&)>;

constexpr int64_t kChannels = 3; // of a half

std::unique_ptr<Optimizer> sgd(const Groups& groups) {
  return std::make_unique<torch::optim::SGD>(
      groups, torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01));
}

std::unique_ptr<Optimizer> adam(const Groups& groups) {
  return std::make_unique<torch::optim::Adam>(
      groups, torch::optim::AdamOptions(0.01));
}

/// Every second parameter has a learning rate of its own.
template <class Options>
Groups two_groups(const std::vector<Tensor>& parameters) {
  std::vector<Tensor> halves[2];
  for (size_t i = 0; i < parameters.size(); ++i) {
    halves[i % 2].push_back(parameters[i]);
  }
  Groups groups;
  groups.emplace_back(halves[0]);
  groups.emplace_back(halves[1], std::make_unique<Options>(0.003));
  return groups;
}

Chain make_chain() {
  return Chain::make(4, [] {
    return torch::nn::AnyModule(memcnn_test::SmoothBranch(kChannels));
  });
}

Tensor loss_of(Chain& chain, std::optional<Engine> engine, int seed) {
  torch::manual_seed(seed);
  const Tensor x = torch::randn({2, 2 * kChannels, 4, 4});
  const Tensor y = engine ? chain.run(*engine, x) : chain.plain(x);
  return y.square().sum();
}

/// Four steps of two chains of the same weights, one with StepInBackward, each
/// with a learning rate that falls.
template <class Options>
void expect_the_weights_of_a_step_after(
    const MakeOptimizer& make,
    std::optional<Engine> engine,
    Chain after) {
  Chain within = after.twin();
  const auto of_after = make(two_groups<Options>(after.parameters()));
  const auto of_within = make(two_groups<Options>(within.parameters()));
  const StepInBackward stepping(*of_within);
  torch::optim::StepLR after_schedule(*of_after, 1, 0.5);
  torch::optim::StepLR within_schedule(*of_within, 1, 0.5);
  for (int step = 0; step < 4; ++step) {
    of_after->zero_grad();
    loss_of(after, engine, step).backward();
    of_after->step();
    after_schedule.step();
    loss_of(within, engine, step).backward();
    of_within->step(); // finds nothing to do
    within_schedule.step();
    for (const Tensor& gradient : within.gradients()) {
      EXPECT_FALSE(gradient.defined());
    }
  }
  EXPECT_TRUE(all_equal(within.parameters(), after.parameters()));
}

class StepInBackwardOf : public testing::TestWithParam<std::optional<Engine>> {
};

TEST_P(StepInBackwardOf, SgdGivesTheWeightsOfAStepAfter) {
  torch::manual_seed(1);
  expect_the_weights_of_a_step_after<torch::optim::SGDOptions>(
      sgd, GetParam(), make_chain());
}

TEST_P(StepInBackwardOf, AdamGivesTheWeightsOfAStepAfter) {
  torch::manual_seed(1);
  expect_the_weights_of_a_step_after<torch::optim::AdamOptions>(
      adam, GetParam(), make_chain());
}

TEST_P(StepInBackwardOf, BranchInSeveralBlocksStepsOnceOnItsWholeGradient) {
  torch::manual_seed(1);
  const auto branch = [] {
    return torch::nn::AnyModule(memcnn_test::SmoothBranch(kChannels));
  };
  const Coupling twice(branch(), branch());
  Chain chain({twice, Coupling(branch(), branch()), twice});
  // A twin would not share: the same weights, one run after the other.
  std::vector<Tensor> start;
  for (const Tensor& parameter : twice->parameters()) {
    start.push_back(parameter.detach().clone());
  }
  const auto update = [&](bool within) {
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < start.size(); ++i) {
      twice->parameters()[i].copy_(start[i]);
    }
    const torch::AutoGradMode with_graph(true);
    torch::optim::SGD optimizer(twice->parameters(), 0.1);
    std::optional<StepInBackward> stepping;
    if (within) {
      stepping.emplace(optimizer);
    }
    loss_of(chain, GetParam(), 5).backward();
    optimizer.step();
    optimizer.zero_grad();
    std::vector<Tensor> found;
    for (const Tensor& parameter : twice->parameters()) {
      found.push_back(parameter.detach().clone());
    }
    return found;
  };
  EXPECT_TRUE(all_equal(update(true), update(false)));
}

TEST_P(StepInBackwardOf, FrozenParametersStay) {
  torch::manual_seed(1);
  Chain chain = make_chain();
  for (Tensor& parameter : chain.block(1)->parameters()) {
    parameter.requires_grad_(false);
  }
  const Tensor frozen = chain.block(1)->parameters()[0];
  const Tensor trained = chain.block(2)->parameters()[0];
  const Tensor frozen_before = frozen.detach().clone();
  const Tensor trained_before = trained.detach().clone();
  torch::optim::SGD optimizer(chain.parameters(), 0.1);
  const StepInBackward stepping(optimizer);
  loss_of(chain, GetParam(), 1).backward();
  EXPECT_TRUE(frozen.equal(frozen_before));
  EXPECT_FALSE(trained.equal(trained_before));
}

TEST_P(StepInBackwardOf, SecondBackwardAfterTwoForwardsIsAnError) {
  torch::manual_seed(1);
  Chain chain = make_chain();
  torch::optim::SGD optimizer(chain.parameters(), 0.1);
  const StepInBackward stepping(optimizer);
  const auto step_twice = [&] {
    const Tensor first = loss_of(chain, GetParam(), 1);
    const Tensor second = loss_of(chain, GetParam(), 2);
    first.backward();
    second.backward();
  };
  EXPECT_THAT(
      step_twice,
      ThrowsError<c10::Error>(HasSubstr(
          GetParam() ? "expected its parameters to be unchanged between "
                       "forward and backward"
                     : "has been modified by an inplace operation")));
}

TEST_P(StepInBackwardOf, BackwardOfASumOfTwoLossesIsOneStep) {
  torch::manual_seed(1);
  Chain after = make_chain();
  Chain within = after.twin();
  const auto sum = [&](Chain& chain) {
    return loss_of(chain, GetParam(), 1) + loss_of(chain, GetParam(), 2);
  };
  torch::optim::SGD of_after(after.parameters(), 0.1);
  sum(after).backward();
  of_after.step();
  torch::optim::SGD of_within(within.parameters(), 0.1);
  const StepInBackward stepping(of_within);
  sum(within).backward();
  EXPECT_TRUE(all_equal(within.parameters(), after.parameters()));
}

INSTANTIATE_TEST_SUITE_P(
    Engines,
    StepInBackwardOf,
    testing::Values(
        std::nullopt,
        Engine::kWrapper,
        Engine::kSequence,
        Engine::kKeptResults),
    [](const auto& engine) {
      return engine.param ? memcnn_test::name_of(*engine.param) : "Plain";
    });

TEST(StepInBackward, HoldsFewGradientsAtATime) {
  constexpr int64_t kLayers = 20;
  constexpr int64_t kWidth = 64;
  const auto peak_of = [&](bool within) {
    torch::nn::Sequential layers;
    for (int64_t i = 0; i < kLayers; ++i) {
      layers->push_back(torch::nn::Linear(kWidth, kWidth));
    }
    torch::optim::SGD optimizer(layers->parameters(), 0.1);
    std::optional<StepInBackward> stepping;
    if (within) {
      stepping.emplace(optimizer);
    }
    const memcnn::AllocationMeter meter(torch::kCPU);
    layers->forward(torch::ones({1, kWidth})).sum().backward();
    optimizer.step();
    return meter.peak_bytes();
  };
  constexpr int64_t kLayerBytes = (kWidth + 1) * kWidth * sizeof(float);
  EXPECT_GE(peak_of(false), kLayers * kLayerBytes);
  EXPECT_LT(peak_of(true), 4 * kLayerBytes);
}

TEST(StepInBackward, HoldsGradientsOfOneBlockOfASequenceAtATime) {
  constexpr size_t kBlocks = 20;
  constexpr int64_t kWidth = 64; // of a half
  torch::manual_seed(1);
  Chain chain = Chain::make(kBlocks, [&] {
    return torch::nn::AnyModule(memcnn_test::LinearBranch(kWidth));
  });
  torch::optim::SGD optimizer(chain.parameters(), 0.1);
  const StepInBackward stepping(optimizer);
  const Tensor x = torch::randn({1, 2 * kWidth}).requires_grad_();
  const memcnn::AllocationMeter meter(torch::kCPU);
  chain.run(Engine::kSequence, x * 1).sum().backward();
  constexpr int64_t kBlockBytes = 2 * (kWidth + 1) * kWidth * sizeof(float);
  EXPECT_LT(meter.peak_bytes(), 3 * kBlockBytes);
}

TEST(StepInBackward, LeavesGradientsAloneWhenItIsGone) {
  torch::nn::Linear layer(2, 3);
  torch::optim::SGD optimizer(layer->parameters(), 0.1);
  { const StepInBackward stepping(optimizer); }
  const Tensor before = layer->weight.detach().clone();
  layer(torch::ones({1, 2})).sum().backward();
  EXPECT_TRUE(layer->weight.grad().defined());
  EXPECT_TRUE(layer->weight.equal(before));
}

TEST(StepInBackward, ThrowsOutOfBackwardWhatAStepThrows) {
  torch::nn::Linear layer(2, 3);
  torch::optim::LBFGS optimizer(layer->parameters());
  const StepInBackward stepping(optimizer);
  EXPECT_THROW(layer(torch::ones({1, 2})).sum().backward(), c10::Error);
  EXPECT_EQ(optimizer.param_groups()[0].params().size(), 2); // as before
}

TEST(StepInBackward, RejectsParametersThatCannotStepOnce) {
  torch::nn::Linear layer(2, 3);
  const auto expected = ThrowsError<c10::Error>(StartsWith(
      "StepInBackward::StepInBackward(): expected distinct parameters without a "
      "post-accumulate hook, but got one of sizes [3, 2] that comes twice or "
      "has one."));
  torch::optim::SGD optimizer(layer->parameters(), 0.1);
  const StepInBackward stepping(optimizer);
  EXPECT_THAT([&] { StepInBackward again(optimizer); }, expected);
  torch::nn::Linear other(2, 3);
  torch::optim::SGD twice({other->weight, other->weight}, 0.1);
  EXPECT_THAT([&] { StepInBackward again(twice); }, expected);
}

TEST(StepInBackward, RejectsParametersOfAReducer) {
  struct Average final : torch::autograd::FunctionPostHook {
    torch::autograd::variable_list operator()(
        const torch::autograd::variable_list& gradients,
        const torch::autograd::variable_list&) override {
      return gradients;
    }
  };
  torch::nn::Linear layer(2, 3);
  const auto accumulator =
      torch::autograd::impl::grad_accumulator(layer->weight);
  accumulator->add_post_hook(std::make_unique<Average>());
  torch::optim::SGD optimizer(layer->parameters(), 0.1);
  const StepInBackward stepping(optimizer);
  EXPECT_THAT(
      [&] {
        layer(torch::ones({1, 2})).sum().backward();
      },
      ThrowsError<c10::Error>(StartsWith(
          "StepInBackward: expected gradients that nothing else waits for, but "
          "got a parameter of a c10d::Reducer (DataParallel)")));
}

TEST(StepInBackwardCuda, GivesTheWeightsOfAStepAfterAndLetsGradientsGo) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  torch::manual_seed(1);
  Chain after = Chain::make(
      20, [] { return torch::nn::AnyModule(memcnn_test::LinearBranch(256)); });
  after.module().to(torch::kCUDA);
  Chain within = after.twin();
  const Tensor x = torch::randn({4, 512}, torch::kCUDA);
  const auto peak_of = [&](Chain& chain, bool in_backward) {
    torch::optim::Adam optimizer(chain.parameters(), 0.01);
    std::optional<StepInBackward> stepping;
    if (in_backward) {
      stepping.emplace(optimizer);
    }
    int64_t peak = 0;
    for (int step = 0; step < 3; ++step) {
      const memcnn::AllocationMeter meter(torch::kCUDA);
      chain.run(Engine::kSequence, x * 1).square().sum().backward();
      optimizer.step();
      optimizer.zero_grad();
      peak = meter.peak_bytes(); // of the last step, which makes no state
    }
    return peak;
  };
  EXPECT_LT(peak_of(within, true), peak_of(after, false) / 4);
  EXPECT_TRUE(all_equal(within.parameters(), after.parameters()));
}

} // namespace
