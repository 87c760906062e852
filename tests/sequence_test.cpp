// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using testing::StrEq;

/// y = weight * x: an invertible module of the user's own.
struct ScaleImpl final : torch::nn::Cloneable<ScaleImpl> {
  explicit ScaleImpl(double start_) : start(start_) {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, start));
  }
  torch::Tensor forward(torch::Tensor x) {
    return x * weight;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y / weight;
  }
  double start;
  torch::Tensor weight;
};
TORCH_MODULE(Scale);

class ReversibleSequence : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  static auto additive() {
    return memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2));
  }
  static auto affine() {
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(2)),
        memcnn::AffineAdapterSigmoid(WideBranch(2)));
  }
};

TEST_F(ReversibleSequence, MixesBlocksOfAllKinds) {
  auto a = additive();
  auto b = affine();
  Scale c(1.5);
  memcnn::ReversibleSequence inner(additive(), additive());
  memcnn::InvertibleModuleWrapper wrapped(additive());
  memcnn::ReversibleSequence trunk(a, b, c, inner);
  trunk->push_back(wrapped);
  trunk->to(torch::kDouble);
  ASSERT_EQ(trunk->size(), 5u);

  const torch::Tensor x = leaf({2, 4, 3, 3});
  std::vector<torch::Tensor> sources = trunk->parameters();
  sources.push_back(x);
  const torch::Tensor plain = wrapped->module([&] {
    torch::Tensor y = c(b(a(x * 1)));
    memcnn::ReversibleSequence off(
        memcnn::ReversibleSequenceOptions().disable(true), inner);
    inner->options.disable(true);
    y = inner(y);
    inner->options.disable(false);
    return y;
  }());
  const auto expected = torch::autograd::grad({plain.square().sum()}, sources);
  const torch::Tensor y = trunk(x * 1);
  EXPECT_LT(relative_error(y, plain), kRoundTripFloat64);
  EXPECT_LT(
      relative_error(
          torch::autograd::grad({y.square().sum()}, sources), expected),
      kGradientFloat64);
  EXPECT_LT(relative_error(trunk->inverse(trunk(x)), x), kRoundTripFloat64);
}

TEST_F(ReversibleSequence, InverseSavesMemoryAndHasRightGradients) {
  memcnn::ReversibleSequence trunk(additive(), affine(), additive());
  trunk->to(torch::kDouble);
  const torch::Tensor y = leaf({2, 4, 3, 3});
  std::vector<torch::Tensor> sources = trunk->parameters();
  sources.push_back(y);
  const torch::Tensor x = trunk->inverse(y * 1);
  EXPECT_NE(x.grad_fn()->name().find("InvertibleFunction"), std::string::npos);
  const auto found = torch::autograd::grad({x.square().sum()}, sources);
  trunk->options.disable(true);
  const auto expected =
      torch::autograd::grad({trunk->inverse(y * 1).square().sum()}, sources);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_F(ReversibleSequence, TakesItsOptionsFirstOrLast) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  const auto options = memcnn::ReversibleSequenceOptions().memory_budget(7);
  memcnn::ReversibleSequence first(options, coupling, coupling);
  memcnn::ReversibleSequence last(coupling, coupling, options);
  for (const auto& sequence : {first, last}) {
    EXPECT_EQ(sequence->options.memory_budget(), 7);
    EXPECT_EQ(sequence->size(), 2u);
  }
}

TEST_F(ReversibleSequence, RefusesToRunWithoutBlocks) {
  memcnn::ReversibleSequence empty;
  const torch::Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
  EXPECT_THAT(
      [&] { empty(x); },
      ThrowsError<c10::Error>(
          StrEq("ReversibleSequence::forward(): expected at least one block, "
                "but got none. Add blocks with push_back().")));
  EXPECT_THAT(
      [&] { empty->inverse(x); },
      ThrowsError<c10::Error>(HasSubstr(
          "ReversibleSequence::inverse(): expected at least one block")));
}

TEST_F(ReversibleSequence, RefusesABudgetBelowZero) {
  memcnn::ReversibleSequence sequence(additive());
  sequence->options.memory_budget(-1);
  EXPECT_THAT(
      [&] {
        sequence(torch::randn({2, 4, 3, 3}));
      },
      ThrowsError<c10::ValueError>(
          StrEq("ReversibleSequence::forward(): expected a memory_budget of 0 "
                "or more bytes, but got -1. 0 keeps no activations.")));
}

TEST_F(ReversibleSequence, NamesTheBlockWhoseShapesDoNotFit) {
  memcnn::ReversibleSequence sequence(
      additive(), memcnn::AdditiveCoupling(SmoothBranch(3), SmoothBranch(3)));
  const torch::Tensor x = leaf({2, 4, 3, 3}, torch::kFloat) * 2;
  const torch::Tensor values = x.detach().clone();
  EXPECT_THAT(
      [&] { sequence(x); },
      ThrowsError<c10::Error>(
          HasSubstr(
              "ReversibleSequence::forward(): block 1 (AdditiveCoupling)"),
          HasSubstr("in F of AdditiveCoupling::forward(): argument sizes [2, "
                    "2, 3, 3]")));
  EXPECT_TRUE(x.equal(values));
}

// Memory format of the halves.

TEST_F(ReversibleSequence, HalvesTravelInTheMemoryFormatAskedFor) {
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  std::vector<bool> asked_for;
  const auto probe = [&](const torch::Tensor& tensor) {
    asked_for.push_back(tensor.is_contiguous(kChannelsLast));
  };
  Chain chain = Chain::make(
      2, [&] { return torch::nn::AnyModule(ProbedProduct(probe)); });
  auto& sequence = *chain.module().as<memcnn::ReversibleSequenceImpl>();
  sequence.options.memory_format(kChannelsLast);
  const torch::Tensor x = leaf({3, 8, 5, 5}, torch::kFloat);
  const torch::Tensor y = sequence.forward(x * 2);
  EXPECT_TRUE(y.is_contiguous()) << "the caller's format";
  y.square().sum().backward();
  EXPECT_EQ(asked_for, std::vector<bool>(12, true)); // and gradients
  EXPECT_TRUE(x.grad().is_contiguous());
  EXPECT_THAT(c10::str(sequence), HasSubstr("memory_format=ChannelsLast)"));
}

TEST_F(ReversibleSequence, MemoryFormatLeavesGradientsAsTheyAre) {
  Chain plain =
      Chain::make(4, [] { return torch::nn::AnyModule(ConvBranch(4)); });
  plain.module().to(torch::kDouble);
  Chain saving = plain.twin();
  auto& sequence = *saving.module().as<memcnn::ReversibleSequenceImpl>();
  sequence.options.memory_format(torch::MemoryFormat::ChannelsLast);
  const torch::Tensor x = leaf({3, 8, 5, 5});
  const torch::Tensor x_twin = x.detach().clone().requires_grad_();
  for (const int64_t budget : {0, 100'000}) {
    sequence.options.memory_budget(budget);
    plain.module().zero_grad();
    saving.module().zero_grad();
    x.mutable_grad() = x_twin.mutable_grad() = torch::Tensor();
    plain.plain(made_by_a_layer(x)).square().sum().backward();
    saving.run(Engine::kSequence, made_by_a_layer(x_twin))
        .square()
        .sum()
        .backward();
    EXPECT_LT(relative_error(x_twin.grad(), x.grad()), kGradientFloat64);
    EXPECT_LT(
        relative_error(saving.gradients(), plain.gradients()),
        kGradientFloat64);
  }
}

TEST_F(ReversibleSequence, RefusesAMemoryFormatOfOtherDims) {
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions().memory_format(
          torch::MemoryFormat::ChannelsLast),
      additive());
  EXPECT_THAT(
      [&] {
        sequence(torch::randn({2, 4}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("ReversibleSequence::forward(): expected an input of 4 "
                    "dims for its memory_format, but got sizes [2, 4]"),
          HasSubstr("Set ChannelsLast for images (N, C, H, W)")));
  sequence->options.memory_format(torch::MemoryFormat::Preserve);
  EXPECT_THAT(
      [&] {
        sequence(torch::randn({2, 4, 3, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "expected a memory_format to convert to, but got Preserve.")));
}

TEST_F(ReversibleSequence, OneArgumentOfItsTypeShares) {
  memcnn::ReversibleSequence trunk(additive());
  memcnn::ReversibleSequence again(trunk);
  EXPECT_EQ(again.ptr(), trunk.ptr());
  memcnn::ReversibleSequence nested(memcnn::ReversibleSequenceOptions(), trunk);
  EXPECT_EQ(nested->size(), 1u);
  EXPECT_NE(nested.ptr(), trunk.ptr());
}

TEST_F(ReversibleSequence, CloneIsDeepAndKeepsModesAndOptions) {
  memcnn::ReversibleSequence trunk(
      memcnn::ReversibleSequenceOptions().preserve_rng_state(false),
      additive(),
      affine(),
      Scale(2.));
  trunk->children()[1]->eval();
  const auto copy =
      std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(trunk->clone());
  const auto second = // a copy of a copy is as deep
      std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(copy->clone());
  for (const auto& each : {copy, second}) {
    EXPECT_FALSE(each->options.preserve_rng_state());
    EXPECT_TRUE(each->is_training());
    EXPECT_FALSE(each->children()[1]->is_training());
    EXPECT_TRUE(all_equal(each->parameters(), trunk->parameters()));
  }
  {
    torch::NoGradGuard no_grad;
    for (torch::Tensor& parameter : copy->parameters()) {
      parameter.add_(1);
    }
  }
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  EXPECT_FALSE(copy->forward(x).equal(trunk->forward(x)));
  EXPECT_TRUE(second->forward(x).equal(trunk->forward(x)));
}

TEST_F(ReversibleSequence, SurvivesSaveAndLoad) {
  memcnn::ReversibleSequence trunk(additive(), affine());
  memcnn::ReversibleSequence other(additive(), affine());
  std::stringstream stream;
  torch::save(trunk, stream);
  torch::load(other, stream);
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  EXPECT_TRUE(other(x).equal(trunk(x)));
}

TEST_F(ReversibleSequence, FitsIntoSequentialAndAnyModule) {
  memcnn::ReversibleSequence trunk(additive(), affine());
  torch::nn::Sequential net(trunk, torch::nn::Flatten());
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  EXPECT_TRUE(net->forward(x).equal(trunk(x).flatten(1)));
  torch::nn::AnyModule any(trunk);
  EXPECT_TRUE(any.forward(x).equal(trunk(x)));
}

// The memory budget.

struct Budgeted {
  int64_t held;
  size_t kept;
  std::vector<torch::Tensor> gradients;
};

Budgeted step_with(
    memcnn::ReversibleSequence& sequence,
    const torch::Tensor& x,
    int64_t budget) {
  sequence->options.memory_budget(budget);
  sequence->zero_grad();
  memcnn::AllocationMeter meter;
  const torch::Tensor loss = sequence(x * 1).square().sum();
  const int64_t held = meter.held_bytes();
  std::vector<torch::Tensor> sources = sequence->parameters();
  sources.push_back(x);
  return {
      held, sequence->kept_blocks(), torch::autograd::grad({loss}, sources)};
}

TEST_F(ReversibleSequence, BudgetKeepsTheLastBlocksThatFit) {
  memcnn::ReversibleSequence sequence;
  for (int i = 0; i < 8; ++i) {
    sequence->push_back(additive());
  }
  sequence->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 8, 8});
  sequence->options.disable(true);
  const Budgeted plain = step_with(sequence, x, 0);
  sequence->options.disable(false);
  const Budgeted none = step_with(sequence, x, 0);
  EXPECT_EQ(none.kept, 0u);
  const Budgeted all = step_with(sequence, x, plain.held * 2);
  EXPECT_EQ(all.kept, 8u);

  int64_t held = none.held;
  size_t kept = 0;
  const int64_t whole = all.held - none.held;
  for (int eighth = 0; eighth <= 8; ++eighth) {
    const int64_t budget = whole * eighth / 8;
    // The second step knows from the first where to start keeping.
    for (int step = 0; step < 2; ++step) {
      const Budgeted some = step_with(sequence, x, budget);
      EXPECT_LE(some.held, none.held + budget);
      EXPECT_GE(some.held, held);
      EXPECT_GE(some.kept, kept);
      EXPECT_LT(
          relative_error(some.gradients, plain.gradients), kGradientFloat64);
      held = some.held;
      kept = some.kept;
    }
    EXPECT_GE(kept, static_cast<size_t>(eighth) - (eighth > 0 ? 1 : 0));
  }
}

TEST_F(ReversibleSequence, BudgetFollowsTheSizeOfTheInput) {
  memcnn::ReversibleSequence sequence(additive(), additive(), additive());
  sequence->to(torch::kDouble);
  const torch::Tensor large = leaf({8, 4, 8, 8});
  const torch::Tensor small = leaf({1, 4, 8, 8});
  const int64_t budget = static_cast<int64_t>(3 * large.nbytes());
  EXPECT_LT(step_with(sequence, large, budget).kept, 3u);
  EXPECT_EQ(step_with(sequence, small, budget).kept, 3u);
  EXPECT_LT(step_with(sequence, large, budget).kept, 3u);
}

TEST_F(ReversibleSequence, BudgetAndRetainedGraphs) {
  memcnn::ReversibleSequence sequence(additive(), additive(), additive());
  sequence->to(torch::kDouble);
  sequence->options.memory_budget(1'000'000);
  const torch::Tensor x = leaf({2, 4, 8, 8});
  const torch::Tensor loss = sequence(x * 1).square().sum();
  ASSERT_EQ(sequence->kept_blocks(), 3u);
  const auto first =
      torch::autograd::grad({loss}, {x}, {}, /*retain_graph=*/true);
  const auto second = torch::autograd::grad({loss}, {x});
  EXPECT_TRUE(first[0].equal(second[0]));
}

TEST_F(ReversibleSequence, BudgetSurvivesABlockThatFailsHalfWay) {
  // The last G throws in its first run: blocks before it are kept by then.
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions().memory_budget(1'000'000));
  Throwing failing(4, 1);
  sequence->push_back(memcnn::AdditiveCoupling(
      torch::nn::Linear(4, 4), torch::nn::Linear(4, 4)));
  sequence->push_back(
      memcnn::AdditiveCoupling(torch::nn::Linear(4, 4), failing));
  const torch::Tensor x = leaf({3, 8}, torch::kFloat);
  const torch::Tensor input = x * 2;
  const torch::Tensor values = input.detach().clone();
  memcnn::AllocationMeter meter;
  EXPECT_THROW(sequence(input), std::domain_error);
  EXPECT_TRUE(input.equal(values)) << "the caller's input";
  EXPECT_EQ(meter.held_bytes(), 0) << "what was kept goes with the failure";
  // Usable again, with right gradients.
  sequence(input).square().sum().backward();
  EXPECT_EQ(sequence->kept_blocks(), 2u);
  const torch::Tensor found = x.grad().clone();
  x.mutable_grad() = torch::Tensor();
  sequence->options.disable(true);
  sequence(x * 2).square().sum().backward();
  EXPECT_LT(relative_error(found, x.grad()), 1e-5);
}

TEST_F(ReversibleSequence, BudgetInsideABudget) {
  auto a = additive();
  auto b = additive();
  memcnn::ReversibleSequence inner(
      memcnn::ReversibleSequenceOptions().memory_budget(1'000'000), a, b);
  memcnn::ReversibleSequence outer(
      memcnn::ReversibleSequenceOptions().memory_budget(1'000'000), inner);
  outer->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 8, 8});
  std::vector<torch::Tensor> sources = outer->parameters();
  sources.push_back(x);
  const auto expected =
      torch::autograd::grad({b(a(x * 1)).square().sum()}, sources);
  const auto found =
      torch::autograd::grad({outer(x * 1).square().sum()}, sources);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_F(ReversibleSequence, BudgetThatIsChangedAndSetAgain) {
  memcnn::ReversibleSequence sequence(additive(), additive());
  sequence->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 8, 8});
  EXPECT_EQ(step_with(sequence, x, 1'000'000).kept, 2u);
  EXPECT_EQ(step_with(sequence, x, 0).kept, 0u);
  EXPECT_EQ(step_with(sequence, x, 1'000'000).kept, 2u);
}

TEST_F(ReversibleSequence, OneBlockTwiceIsOneChild) {
  auto block = additive();
  memcnn::ReversibleSequence sequence(block, block);
  sequence->to(torch::kDouble);
  EXPECT_EQ(sequence->parameters().size(), block->parameters().size());
  const auto copy = std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(
      sequence->clone());
  EXPECT_EQ(copy->parameters().size(), block->parameters().size());
  const torch::Tensor x = leaf({2, 4, 8, 8});
  std::vector<torch::Tensor> sources = block->parameters();
  sources.push_back(x);
  const auto expected =
      torch::autograd::grad({block(block(x * 1)).square().sum()}, sources);
  const auto found =
      torch::autograd::grad({sequence(x * 1).square().sum()}, sources);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

// Depth.

TEST_F(ReversibleSequence, ThousandBlocksTrainInLessThanOneGiB) {
  // 2 x 16 channels, batch 20, 32 x 32: plain autograd would hold 10 GiB.
  struct ThinImpl : torch::nn::Cloneable<ThinImpl> {
    ThinImpl() {
      reset();
    }
    void reset() override {
      norm = register_module("norm", torch::nn::BatchNorm2d(16));
      conv = register_module(
          "conv",
          torch::nn::Conv2d(
              torch::nn::Conv2dOptions(16, 16, 3).padding(1).bias(false)));
    }
    torch::Tensor forward(torch::Tensor x) {
      return conv(norm(x).relu_());
    }
    torch::nn::BatchNorm2d norm{nullptr};
    torch::nn::Conv2d conv{nullptr};
  };
  using Thin = torch::nn::ModuleHolder<ThinImpl>;
  memcnn::ReversibleSequence sequence;
  for (int i = 0; i < 1000; ++i) {
    sequence->push_back(memcnn::AdditiveCoupling(
        Thin(std::make_shared<ThinImpl>()),
        Thin(std::make_shared<ThinImpl>())));
  }
  int64_t own = 0; // parameters' gradients and momentum
  for (const torch::Tensor& parameter : sequence->parameters()) {
    own += 2 * static_cast<int64_t>(parameter.nbytes());
  }
  torch::optim::SGD optimizer(
      sequence->parameters(), torch::optim::SGDOptions(1e-4).momentum(0.9));
  const torch::Tensor x = torch::randn({20, 32, 32, 32});
  memcnn::AllocationMeter meter;
  const torch::Tensor loss = sequence(x).square().mean();
  loss.backward();
  optimizer.step();
  EXPECT_TRUE(std::isfinite(loss.item<float>()));
  EXPECT_LT(meter.peak_bytes() - own, int64_t{1} << 30);
}

TEST_F(ReversibleSequence, IsInvertible) {
  memcnn::ReversibleSequence trunk(additive(), affine(), Scale(0.5));
  EXPECT_TRUE(memcnn::is_invertible_module(
      trunk,
      {2, 4, 3, 3},
      memcnn::IsInvertibleOptions().atol(1e-4).rtol(1e-4)));
}

} // namespace
} // namespace memcnn_test
