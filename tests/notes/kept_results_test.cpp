// SPDX-License-Identifier: MIT
//
// Note [Kept results], rule by rule. For each dear operator see
// detail/dear_operators_test.cpp; every rule of Note [Recomputation] is tested
// with kept results where it is tested, as is how modules meet
// (interaction_test.cpp).

#include "../support/counted_operators.h"
#include "../support/keeping_chain.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

using Counts = CountedOperators::Counts;
using Function = FunctionBranchImpl::Function;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kChannels = 3; // of a half

Tensor conv(const Tensor& x, const Tensor& weight) {
  return torch::conv2d(x, weight, {}, /*stride=*/1, /*padding=*/1);
}

/// A branch on images, with two filters.
Branch conv_branch(Function function) {
  return [function = std::move(function)] {
    Tensors filters;
    for (int i = 0; i < 2; ++i) {
      filters.push_back(
          0.3 * torch::randn({kChannels, kChannels, 3, 3}, torch::kDouble));
    }
    return torch::nn::AnyModule(FunctionBranch(filters, function));
  };
}

Tensor two_convolutions(const Tensor& x, const Tensors& w) {
  return torch::tanh(conv(torch::tanh(conv(x, w[0])), w[1]));
}

Tensor image_leaf(torch::ScalarType dtype = torch::kDouble) {
  return leaf({2, 2 * kChannels, 5, 5}, dtype);
}

class KeptResults : public testing::TestWithParam<Keeping> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  Tensor run(KeepingChain& chain, const Tensor& x) {
    keeper_ = Keeper(GetParam());
    return chain.run(GetParam(), keeper_, made_by_a_layer(x));
  }

  /// With all results kept, gradients and outputs are those of plain autograd,
  /// and so are they in a second step.
  void expect_like_plain(
      KeepingChain& chain,
      const Tensor& x,
      double tolerance = kGradientFloat64) {
    const Tensor plain = chain.plain(x);
    const Tensors expected = chain.gradients(plain, x);
    for (int step = 0; step < 2; ++step) {
      const Tensor y = run(chain, x);
      EXPECT_LT(relative_error(y, plain), kRoundTripFloat64);
      EXPECT_GT(keeper_.kept().count, 0u);
      EXPECT_LT(relative_error(chain.gradients(y, x), expected), tolerance);
    }
  }

  Keeper keeper_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(
    Ways,
    KeptResults,
    all_ways_of_keeping(),
    keeping_name);

// Rule 1: the second run takes the results, and what follows them computes from
// the very bits of forward.

TEST_P(KeptResults, Rule1WhatFollowsSeesTheBitsOfForward) {
  std::vector<Tensor> seen;
  KeepingChain chain(conv_branch([&](const Tensor& x, const Tensors& w) {
    const Tensor result = conv(x, w[0]);
    seen.push_back(result.detach().clone());
    return torch::tanh(result) * w[1].sum();
  }));
  chain.sequence->to(torch::kFloat);
  const Tensor x = image_leaf(torch::kFloat);
  chain.gradients(run(chain, x), x);
  ASSERT_EQ(seen.size(), 8u);
  for (size_t i = 0; i < 4;
       ++i) { // in backward from the last one on, or in pairs
    EXPECT_TRUE(std::any_of(seen.begin() + 4, seen.end(), [&](auto& again) {
      return again.equal(seen[i]);
    })) << i;
  }
}

TEST_P(KeptResults, Rule1SecondDerivativesAreRight) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = image_leaf();
  const auto second_derivatives = [&](const Tensor& y) {
    Tensors sources = chain.sequence->parameters();
    sources.push_back(x);
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (const Tensor& gradient : torch::autograd::grad(
             {chain.loss(y)},
             sources,
             {},
             /*retain_graph=*/true,
             /*create_graph=*/true)) {
      sum = sum + gradient.square().sum();
    }
    return torch::autograd::grad({sum}, sources);
  };
  const Tensors expected = second_derivatives(chain.plain(x));
  EXPECT_LT(
      relative_error(second_derivatives(run(chain, x)), expected),
      kSecondDerivativeFloat64);
}

TEST_P(KeptResults, Rule1SomeResultsMayBeKept) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = image_leaf();
  const Tensors expected = chain.gradients(chain.plain(x), x);
  for (const auto& which : std::vector<std::vector<bool>>{
           {true}, {false, true}, {false, false, true, true}, {}}) {
    Keeper keeper(GetParam());
    keeper.keep_only(which);
    const Tensor y = chain.run(GetParam(), keeper, made_by_a_layer(x));
    EXPECT_LT(
        relative_error(chain.gradients(y, x), expected), kGradientFloat64);
  }
}

TEST_P(KeptResults, Rule1OneFilterMayBeUsedTwice) {
  KeepingChain chain(conv_branch([](const Tensor& x, const Tensors& w) {
    return torch::tanh(conv(torch::tanh(conv(x, w[0])), w[0])) * w[1].sum();
  }));
  expect_like_plain(chain, image_leaf());
}

TEST_P(KeptResults, Rule1FiltersMayBeComputed) {
  KeepingChain chain(conv_branch([](const Tensor& x, const Tensors& w) {
    return conv(x, w[0] / w[0].norm() * w[1].norm());
  }));
  expect_like_plain(chain, image_leaf());
}

TEST_P(KeptResults, Rule1FiltersMayBeFrozen) {
  KeepingChain chain(conv_branch([](const Tensor& x, const Tensors& w) {
    return conv(torch::tanh(conv(x, w[0].detach())), w[1]) + w[0].sum();
  }));
  expect_like_plain(chain, image_leaf());
}

TEST_P(KeptResults, Rule1HooksOnResultsFireOnce) {
  int fired = 0;
  KeepingChain chain(conv_branch([&](const Tensor& x, const Tensors& w) {
    const Tensor result = conv(x, w[0]);
    if (result.requires_grad()) {
      result.register_hook([&](const Tensor& gradient) {
        ++fired;
        return gradient * 2;
      });
    }
    return torch::tanh(result) * w[1].sum();
  }));
  const Tensor x = image_leaf();
  const Tensors expected = chain.gradients(chain.plain(x), x);
  fired = 0;
  EXPECT_LT(
      relative_error(chain.gradients(run(chain, x), x), expected),
      kGradientFloat64);
  EXPECT_EQ(fired, 4);
}

TEST_P(KeptResults, Rule1SomeGradientsMayBeAskedFor) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = image_leaf();
  const Tensors parameters = chain.sequence->parameters();
  for (const Tensors& sources :
       {Tensors{x}, Tensors{parameters[1]}, Tensors{parameters.back()}}) {
    const auto gradients = [&](const Tensor& y) {
      return torch::autograd::grad({chain.loss(y)}, sources);
    };
    const Tensors expected = gradients(chain.plain(x));
    EXPECT_LT(
        relative_error(gradients(run(chain, x)), expected), kGradientFloat64);
  }
}

/// A leaf of its own inside, as a gradient inside of forward needs it.
TEST_P(KeptResults, Rule1ABranchMayHaveLeavesOfItsOwn) {
  KeepingChain chain(conv_branch([](const Tensor& x, const Tensors& w) {
    Tensor slope;
    {
      const torch::AutoGradMode with_graph(true);
      const Tensor inner = torch::tanh(x).detach().requires_grad_();
      slope = torch::autograd::grad(
          {conv(inner, w[0].detach()).square().sum()}, {inner})[0];
    }
    return conv(x, w[1]) + slope + w[0].sum();
  }));
  if (GetParam() != Keeping::kCheckpoint) { // which needs early_stop(false)
    expect_like_plain(chain, image_leaf());
  }
}

TEST_P(KeptResults, Rule1AnEmptyBatchHasResultsOfNoBytes) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = leaf({0, 2 * kChannels, 5, 5});
  const Tensors expected = chain.gradients(chain.plain(x), x);
  EXPECT_TRUE(all_equal(chain.gradients(run(chain, x), x), expected));
  EXPECT_EQ(keeper_.kept().bytes, 0);
}

TEST_P(KeptResults, Rule1WithoutAGraphNothingIsKept) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = image_leaf();
  const auto expect_plain = [&] {
    const CountedOperators counted;
    run(chain, x.detach());
    EXPECT_EQ(keeper_.kept().count, 0u);
    EXPECT_EQ(counted.counts(), (Counts{{"aten::convolution", 8}}));
  };
  {
    const torch::NoGradGuard no_grad;
    expect_plain();
  }
  const c10::InferenceMode inference;
  expect_plain();
}

// Rule 2: a kept result is written by nobody.

struct Writer {
  std::string name;
  Function function; // of the argument and the filters
};

void PrintTo(const Writer& writer, std::ostream* stream) {
  *stream << writer.name;
}

/// Branches that write what a convolution returned.
std::vector<Writer> writers() {
  return {
      {"Relu",
       [](auto x, auto& w) {
         return conv(x, w[0]).relu_() * w[1].sum();
       }},
      {"ReluOfADetachedOne",
       [](auto x, auto& w) {
         const Tensor result = conv(x, w[0]);
         const Tensor positive = result.detach();
         positive.relu_();
         return result * w[1].sum();
       }},
      {"Add",
       [](auto x, auto& w) {
         return conv(x, w[0]).add_(w[1].sum());
       }},
      {"ProductOfTwo",
       [](auto x, auto& w) {
         const Tensor result = conv(x, w[0]);
         return conv(torch::tanh(result), w[1]).mul_(result);
       }},
      {"Copy",
       [](auto x, auto& w) {
         Tensor result = conv(x, w[0]);
         const Tensor copy = result * 2;
         result.copy_(x);
         return copy * w[1].sum() + result;
       }},
      {"WriteOfAPart",
       [](auto x, auto& w) {
         Tensor result = conv(x, w[0]);
         result.narrow(1, 0, 1).mul_(w[1].sum());
         return result;
       }},
      {"WriteThroughAPointer",
       [](auto x, auto& w) {
         const Tensor result = conv(x, w[0]);
         result.template data_ptr<double>()[0] += 1;
         return torch::tanh(result) * w[1].sum();
       }},
      {"SetData",
       [](auto x, auto& w) {
         Tensor result = conv(x, w[0]);
         result.set_data(result.detach() * 2);
         return torch::tanh(result) * w[1].sum();
       }},
  };
}

/// Branches that return it.
std::vector<Writer> returners() {
  return {
      {"TheResult",
       [](auto x, auto& w) {
         return conv(x, w[0] * w[1].sum());
       }},
      {"ViewOfTheResult",
       [](auto x, auto& w) {
         return conv(x, torch::cat({w[0], w[1]})).narrow(1, 1, kChannels);
       }},
      {"PartsOfTheResult",
       [](auto x, auto& w) {
         const Tensors parts = conv(x, torch::cat({w[0], w[1]})).chunk(2, 1);
         return parts[0] * torch::sigmoid(parts[1]);
       }},
      {"TransposedTwice",
       [](auto x, auto& w) {
         return conv(conv(x, w[0]).transpose(2, 3), w[1]).transpose(2, 3);
       }},
  };
}

class WrittenResults
    : public testing::TestWithParam<std::tuple<Keeping, Writer>> {};

INSTANTIATE_TEST_SUITE_P(
    Ways,
    WrittenResults,
    testing::Combine(all_ways_of_keeping(), testing::ValuesIn(writers())),
    way_and_case<Writer>);
INSTANTIATE_TEST_SUITE_P(
    WaysOfReturners,
    WrittenResults,
    testing::Combine(all_ways_of_keeping(), testing::ValuesIn(returners())),
    way_and_case<Writer>);

TEST_P(WrittenResults, Rule2GradientsEqualPlainOnes) {
  const auto& [way, writer] = GetParam();
  torch::manual_seed(1);
  KeepingChain chain(conv_branch(writer.function));
  const Tensor x = image_leaf();
  const Tensor plain = chain.plain(x);
  const Tensors expected = chain.gradients(plain, x);
  Keeper keeper(way);
  const Tensor y = chain.run(way, keeper, made_by_a_layer(x));
  EXPECT_GE(keeper.kept().count, 4u);
  EXPECT_LT(relative_error(chain.gradients(y, x), expected), kGradientFloat64);
  EXPECT_TRUE(y.equal(plain)) << "after backward";
}

TEST_P(WrittenResults, Rule2SeveralPassesAreAlike) {
  const auto& [way, writer] = GetParam();
  torch::manual_seed(1);
  KeepingChain chain(conv_branch(writer.function));
  const Tensor x = image_leaf();
  const Tensors expected = chain.gradients(chain.plain(x), x);
  Keeper keeper(way);
  const Tensor loss = chain.loss(chain.run(way, keeper, made_by_a_layer(x)));
  const Tensors sources = chain.sources(x);
  for (const bool retain : {true, true, false}) {
    EXPECT_LT(
        relative_error(
            torch::autograd::grad({loss}, sources, {}, retain), expected),
        kGradientFloat64);
  }
}

/// On a GPU, where they run again, if need be.
class WrittenResultsCuda : public WrittenResults {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

std::vector<Writer> writers_of_a_gpu() {
  std::vector<Writer> all = returners();
  for (const Writer& writer : writers()) {
    if (writer.name != "WriteThroughAPointer") {
      all.push_back(writer);
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(
    Ways,
    WrittenResultsCuda,
    testing::Combine(
        all_ways_of_keeping(),
        testing::ValuesIn(writers_of_a_gpu())),
    way_and_case<Writer>);

TEST_P(WrittenResultsCuda, Rule2GradientsEqualPlainOnes) {
  const auto& [way, writer] = GetParam();
  torch::manual_seed(1);
  KeepingChain chain(conv_branch(writer.function));
  chain.sequence->to(torch::kCUDA);
  const Tensor x = image_leaf().detach().to(torch::kCUDA).requires_grad_();
  const Tensors expected = chain.gradients(chain.plain(x), x);
  Keeper keeper(way);
  const Tensor loss = chain.loss(chain.run(way, keeper, made_by_a_layer(x)));
  const Tensors sources = chain.sources(x);
  EXPECT_GE(keeper.kept().count, 4u);
  for (const bool retain : {true, false}) {
    EXPECT_LT(
        relative_error(
            torch::autograd::grad({loss}, sources, {}, retain), expected),
        kGradientFloat64);
  }
}

/// An output that is a kept result, which the caller writes.
TEST(KeptResultsOfACheckpoint, Rule2MayBeWrittenByTheCaller) {
  torch::manual_seed(1);
  torch::nn::Conv2d layer(torch::nn::Conv2dOptions(4, 4, 3).padding(1));
  layer->to(torch::kDouble);
  const auto block = std::make_shared<memcnn::detail::ForwardOnly>(
      "here",
      layer.ptr(),
      [&](const Tensors& inputs) { return Tensors{layer(inputs[0])}; },
      memcnn::detail::ForwardOnlySettings());
  const Tensor x = leaf({2, 4, 5, 5});
  const auto gradients = [&](Tensor y) {
    return torch::autograd::grad(
        {y.relu_().square().sum()}, {x, layer->weight, layer->bias});
  };
  const Tensors expected = gradients(layer(x));
  for (const bool early_stop : {true, false}) {
    Keeper keeper(
        early_stop ? Keeping::kCheckpoint : Keeping::kCheckpointToTheEnd);
    const Tensors found = gradients(keeper.run(block, x));
    EXPECT_EQ(keeper.kept().count, 1u);
    EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  }
}

// Rule 3: the second run calls the same operators as the first.

/// What a branch does in the first run, and what it does in later ones.
struct Change {
  std::string name;
  Function first;
  Function later;
  std::string message;
};

void PrintTo(const Change& change, std::ostream* stream) {
  *stream << change.name;
}

std::vector<Change> changes() {
  const auto both = [](size_t i, size_t j) {
    return [=](const Tensor& x, const Tensors& w) {
      return torch::tanh(conv(torch::tanh(conv(x, w[i])), w[j]));
    };
  };
  const auto one = [](const Tensor& x, const Tensors& w) {
    return torch::tanh(conv(x, w[0])) * w[1].sum();
  };
  const auto one_image = [](const Tensor& x, const Tensors& w) {
    return torch::tanh(conv(x.narrow(0, 0, 1), w[0])) * w[1].sum() + 0 * x;
  };
  const auto product = [](const Tensor& x, const Tensors& w) {
    return torch::matmul(x, x) * w[0].sum() * w[1].sum();
  };
  const auto product_after_one = [=](const Tensor& x, const Tensors& w) {
    return product(one(x, w), w);
  };
  const auto one_after_product = [=](const Tensor& x, const Tensors& w) {
    return one(product(x, w), w);
  };
  const auto called = [](const std::string& filter, int64_t images = 2) {
    return "aten::convolution (sizes [" + std::to_string(images) +
        ", 3, 5, 5], Double, cpu; '" + filter +
        "', sizes [3, 3, 3, 3], Double, cpu)";
  };
  const std::string number =
      " of its convolutions, products and attention, "
      "but got ";
  return {
      {"AnotherOrderOfFilters",
       both(0, 1),
       both(1, 0),
       called("weight0") + " as number 0" + number + called("weight1")},
      {"AnotherOrderOfOperators",
       product_after_one,
       one_after_product,
       called("weight0") + " as number 0" + number +
           "aten::bmm (sizes [6, 5, "
           "5], Double, cpu; sizes [6, 5, 5], Double, cpu)"},
      {"OneLess",
       both(0, 1),
       one,
       "2 convolutions, products and attentions, but got 1, without " +
           called("weight1")},
      {"OneMore",
       one,
       both(0, 1),
       "none any more as number 1" + number + called("weight1")},
      {"OneTwice",
       one,
       both(0, 0),
       "none any more as number 1" + number + called("weight0")},
      {"OtherSizes",
       one,
       one_image,
       called("weight0") + " as number 0" + number + called("weight0", 1)}};
}

class ChangedRun : public testing::TestWithParam<std::tuple<Keeping, Change>> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  /// What backward fails with.
  std::string message() {
    const Tensor x = image_leaf();
    is_first_ = true;
    Keeper keeper(std::get<0>(GetParam()));
    const Tensor y =
        chain_.run(std::get<0>(GetParam()), keeper, made_by_a_layer(x));
    is_first_ = false;
    try {
      chain_.gradients(y, x);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  }

  const Change& change_ = std::get<1>(GetParam());
  bool is_first_ = true;
  KeepingChain chain_{
      conv_branch([this](const Tensor& x, const Tensors& w) {
        return (is_first_ ? change_.first : change_.later)(x, w);
      }),
      /*depth=*/1};
};

INSTANTIATE_TEST_SUITE_P(
    Ways,
    ChangedRun,
    testing::Combine(
        testing::Values(
            Keeping::kWrapper,
            Keeping::kKeepInput,
            Keeping::kSequence),
        testing::ValuesIn(changes())),
    way_and_case<Change>);

TEST_P(ChangedRun, Rule3IsAnErrorThatNamesBranchAndOperator) {
  EXPECT_THAT(
      message(),
      AllOf(
          HasSubstr("memcnn: expected 'memcnn_test::FunctionBranchImpl' to run "
                    "in backward the operators that it ran in forward"),
          HasSubstr(change_.message),
          HasSubstr("memory_budget(0) runs all again")));
}

TEST_P(ChangedRun, Rule3LeavesNothingInTheThread) {
  message();
  torch::nn::Conv2d layer(kChannels, kChannels, 3);
  layer->to(torch::kDouble);
  const Tensor x = leaf({2, kChannels, 5, 5});
  const CountedOperators counted;
  EXPECT_TRUE(layer(x).equal(layer(x)));
  EXPECT_EQ(counted.counts(), (Counts{{"aten::convolution", 2}}));
}

/// Of which a part is early found by what it saves.
class ChangedCheckpoint : public ChangedRun {};

INSTANTIATE_TEST_SUITE_P(
    Ways,
    ChangedCheckpoint,
    testing::Combine(
        testing::Values(Keeping::kCheckpoint, Keeping::kCheckpointToTheEnd),
        testing::ValuesIn(changes())),
    way_and_case<Change>);

TEST_P(ChangedCheckpoint, Rule3IsAnError) {
  EXPECT_THAT(
      message(),
      AllOf(HasSubstr("memcnn: expected"), HasSubstr("in backward the")));
}

/// Which operators a product runs may depend on whether a graph is recorded.
TEST_P(KeptResults, Rule3ProductsOfComputedWeightsMayBeFoldedInOneRunOnly) {
  const auto product = [](bool left) {
    return [left](const Tensor& x, const Tensors& w) {
      const Tensor weight = torch::mm(w[0], w[1]);
      const Tensor value = left
          ? torch::matmul(weight, x)
          : torch::matmul(x.transpose(1, 2), weight).transpose(1, 2);
      return torch::tanh(torch::matmul(w[2], value));
    };
  };
  for (const bool left : {true, false}) {
    SCOPED_TRACE(left);
    KeepingChain chain([&] {
      const Tensors factors = {
          0.3 * torch::randn({4, 2}, torch::kDouble),
          0.3 * torch::randn({2, 4}, torch::kDouble),
          0.3 * torch::randn({4, 4}, torch::kDouble)};
      return torch::nn::AnyModule(FunctionBranch(factors, product(left)));
    });
    expect_like_plain(chain, leaf({3, 8, 5}));
  }
}

TEST_P(KeptResults, Rule3ProductsWithSeveralWeightsMayBeFoldedInOneRunOnly) {
  KeepingChain chain([&] {
    const Tensors weights = {0.3 * torch::randn({2, 4, 4}, torch::kDouble)};
    return torch::nn::AnyModule(
        FunctionBranch(weights, [](const Tensor& x, const Tensors& w) {
          return torch::matmul(torch::tanh(x), w[0]).sum(0);
        }));
  });
  expect_like_plain(chain, leaf({3, 8}));
}

/// Attention has a kernel for masks without a gradient only.
TEST_P(KeptResults, Rule3AttentionWithALearnedMaskMayBeInPartsInOneRunOnly) {
  KeepingChain chain([&] {
    const Tensors weights = {
        torch::randn({5, 5}, torch::kDouble),
        0.3 * torch::randn({6, 6}, torch::kDouble)};
    return torch::nn::AnyModule(
        FunctionBranch(weights, [](const Tensor& x, const Tensors& w) {
          return torch::matmul(
              at::scaled_dot_product_attention(x, x, x, torch::tanh(w[0])),
              w[1]);
        }));
  });
  expect_like_plain(chain, leaf({2, 4, 5, 6}));
}

/// Which of several products it was cannot be told by sizes.
TEST_P(KeptResults, Rule3ProductsOfTheSameSizesAreNotTakenForEachOther) {
  KeepingChain chain([&] {
    const Tensors weights = {
        0.3 * torch::randn({6, 6}, torch::kDouble),
        0.3 * torch::randn({6, 6}, torch::kDouble)};
    return torch::nn::AnyModule(
        FunctionBranch(weights, [](const Tensor& x, const Tensors& w) {
          const Tensor weight = torch::tanh(w[0]);
          const Tensor across = x.transpose(0, 1); // folded with a graph only
          const Tensor first = torch::matmul(across, weight);
          const Tensor second = torch::bmm(
              torch::cos(across).contiguous(),
              1 * weight.expand({across.size(0), 6, 6}));
          const Tensor third = torch::matmul(torch::sin(across), weight);
          return torch::matmul(
              (first * torch::sin(second) + third).transpose(0, 1), w[1]);
        }));
  });
  expect_like_plain(chain, leaf({3, 8, 6}));
}

// Rule 4: kept results are counted, and let go block by block.

/// Bytes that one step takes beside its input: after forward, and at most.
struct Bytes {
  int64_t results; // of these, those of kept results
  int64_t held;
  int64_t peak;
};

TEST_P(KeptResults, Rule4TheyAreHeldUntilTheirBlockIsDone) {
  std::vector<int64_t> held;
  const memcnn::AllocationMeter* meter = nullptr;
  KeepingChain chain(
      conv_branch([&](const Tensor& x, const Tensors& w) {
        if (meter != nullptr && torch::GradMode::is_enabled()) {
          held.push_back(meter->held_bytes());
        }
        return two_convolutions(x, w);
      }),
      /*depth=*/4);
  const Tensor x = leaf({4, 2 * kChannels, 16, 16});
  const Tensors like = chain.gradients(chain.plain(x), x); // warm
  const auto step = [&](bool keep) {
    const Tensor input = made_by_a_layer(x);
    memcnn::AllocationMeter here;
    meter = &here;
    Keeper keeper(GetParam());
    if (!keep) {
      keeper.keep_only({});
    }
    Tensor y = chain.run(GetParam(), keeper, input);
    const Bytes forward{keeper.kept().bytes, here.held_bytes(), 0};
    held.clear();
    {
      const Tensors gradients = chain.gradients(y, x);
      y = Tensor();
      EXPECT_LE(here.held_bytes(), 2 * static_cast<int64_t>(x.nbytes()));
    }
    meter = nullptr;
    return Bytes{forward.results, forward.held, here.peak_bytes()};
  };
  const Bytes without = step(false);
  const Bytes with = step(true);
  EXPECT_EQ(without.results, 0);
  EXPECT_EQ(with.results, 8 * static_cast<int64_t>(x.nbytes()));
  EXPECT_EQ(with.held, without.held + with.results);
  EXPECT_LE(with.peak - with.held, without.peak - without.held);
  ASSERT_GE(held.size(), 8u);
  EXPECT_LE(
      held.back(),
      held.front() - with.results / 2); // the others had been there
}

TEST_P(KeptResults, Rule4NothingIsLeftOfThem) {
  bool is_to_throw = false;
  KeepingChain chain(
      conv_branch([&](const Tensor& x, const Tensors& w) {
        const Tensor result = two_convolutions(x, w);
        if (is_to_throw) {
          throw std::domain_error("the branch gave up");
        }
        return result;
      }),
      /*depth=*/4);
  const Tensor x = image_leaf();
  chain.gradients(chain.plain(x), x);
  const auto expect_nothing = [&](const auto& use) {
    const memcnn::AllocationMeter meter;
    {
      const Tensor y = run(chain, x);
      EXPECT_GE(meter.held_bytes(), keeper_.kept().bytes);
      use(y);
      is_to_throw = false;
    }
    keeper_ = Keeper(GetParam());
    EXPECT_EQ(meter.held_bytes(), 0);
  };
  expect_nothing([](const Tensor&) {}); // backward is never run
  expect_nothing([&](const Tensor& y) { chain.gradients(y, x); });
  expect_nothing([&](const Tensor& y) {
    is_to_throw = true;
    EXPECT_ANY_THROW(chain.gradients(y, x));
  });
}

// Rule 5: what draws runs again. On a CPU attention with dropout does so in
// parts, of which those that are dear draw nothing (kept_operators_test.cpp).

TEST_P(KeptResults, Rule5WhatDrawsInBetweenDrawsTheSame) {
  KeepingChain chain(conv_branch([](const Tensor& x, const Tensors& w) {
    return torch::dropout(
        conv(torch::dropout(conv(x, w[0]), 0.5, /*train=*/true), w[1]),
        0.5,
        /*train=*/true);
  }));
  const Tensor x = image_leaf();
  torch::manual_seed(3);
  const Tensors expected = chain.gradients(chain.plain(x), x);
  torch::manual_seed(3);
  const Tensor y = run(chain, x);
  EXPECT_LT(relative_error(chain.gradients(y, x), expected), kGradientFloat64);
}

// Rule 6: of batch normalisation the statistics are kept.

TEST_P(KeptResults, Rule6StatisticsAreKept) {
  KeepingChain chain(
      [&] { return torch::nn::AnyModule(torch::nn::BatchNorm2d(kChannels)); });
  chain.sequence->to(torch::kDouble);
  expect_like_plain(chain, image_leaf());
  constexpr int64_t kStatistics = 2 * kChannels * sizeof(double);
  EXPECT_EQ(keeper_.kept().bytes, 4 * kStatistics);
}

// Rule 7: in debug mode the comparison runs everything.

TEST_P(KeptResults, Rule7DebugComparesWhatRunsAgain) {
  KeepingChain chain(conv_branch(two_convolutions));
  const Tensor x = image_leaf();
  Tensors expected;
  int gradients = 0; // the plain ones
  {
    const Tensor y = chain.plain(x);
    const CountedOperators counted;
    expected = chain.gradients(y, x);
    gradients = counted.counts()["aten::convolution"];
  }
  memcnn::RecordingOptions options;
  options.debug = true;
  keeper_ = Keeper(GetParam(), options);
  const Tensor y = chain.run(GetParam(), keeper_, made_by_a_layer(x));
  const CountedOperators counted;
  EXPECT_LT(relative_error(chain.gradients(y, x), expected), kGradientFloat64);
  EXPECT_EQ(counted.counts()["aten::convolution"], gradients + 8);
}

TEST_P(KeptResults, Rule7DebugFindsHiddenStateBehindAKeptResult) {
  double factor = 1;
  KeepingChain chain(conv_branch([&](const Tensor& x, const Tensors& w) {
    factor *= 2;
    return conv(x * factor, w[0]) * w[1].sum();
  }));
  const Tensor x = image_leaf();
  memcnn::RecordingOptions options;
  options.debug = true;
  keeper_ = Keeper(GetParam(), options);
  const Tensor y = chain.run(GetParam(), keeper_, made_by_a_layer(x));
  EXPECT_THAT(
      [&] { chain.gradients(y, x); },
      ThrowsError<c10::Error>(
          HasSubstr("returned in forward for the same argument")));
}

} // namespace
} // namespace memcnn_test
