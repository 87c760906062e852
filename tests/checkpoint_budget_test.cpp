// SPDX-License-Identifier: MIT
//
// The memory_budget of checkpoint() and checkpoint_sequential().

#include "support/autocast.h"
#include "support/counted_operators.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

namespace nn = torch::nn;
using memcnn::KeptActivations;
using testing::HasSubstr;
using Options = memcnn::CheckpointOptions;
using SequentialOptions = memcnn::CheckpointSequentialOptions;

/// So many that a result of a convolution is worth more than a graph.
constexpr int64_t kChannels = 32;
constexpr int64_t kMuch = int64_t{1} << 30; // bytes
/// Of the result of a convolution, in float64.
constexpr int64_t kResult = 2 * kChannels * 6 * 6 * 8;
/// Of the statistics of a normalisation.
constexpr int64_t kStatistics = 2 * kChannels * 8;
/// Of the states of random number generators, each 5 KB.
constexpr int64_t kStates = 16 << 10;

nn::Conv2d convolution() {
  return nn::Conv2d(nn::Conv2dOptions(kChannels, kChannels, 3).padding(1));
}
nn::ReLU relu(bool in_place) {
  return nn::ReLU(nn::ReLUOptions().inplace(in_place));
}

/// Everything that a second run has to repeat, and a layer that writes the result
/// of a convolution.
nn::Sequential network() {
  torch::manual_seed(1);
  nn::Sequential layers(
      convolution(),
      nn::BatchNorm2d(kChannels),
      relu(/*in_place=*/true),
      nn::Dropout(0.3),
      convolution(),
      nn::LeakyReLU(nn::LeakyReLUOptions().inplace(true)),
      convolution(),
      nn::BatchNorm2d(kChannels),
      nn::Tanh(),
      convolution());
  layers->to(torch::kDouble);
  return layers;
}
/// All that is dear in it, but for the last convolution.
constexpr int64_t kAllOfNetwork = 3 * kResult + 2 * kStatistics;

class CheckpointBudget : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  static Options with(int64_t budget) {
    return Options().memory_budget(budget);
  }
  static SequentialOptions within(int64_t segments, int64_t budget) {
    return SequentialOptions().segments(segments).memory_budget(budget);
  }

  /// Gradients and buffers of a fresh network after a step.
  template <class Run>
  std::vector<torch::Tensor> step(const Run& run) {
    nn::Sequential layers = network();
    torch::manual_seed(7);
    run(layers, x_ * 1).square().sum().backward();
    std::vector<torch::Tensor> result = layers->buffers();
    for (const torch::Tensor& parameter : layers->parameters()) {
      result.push_back(parameter.grad());
    }
    result.push_back(std::exchange(x_.mutable_grad(), torch::Tensor()));
    return result;
  }

  std::vector<torch::Tensor> plain_step() {
    return step([](nn::Sequential& layers, const torch::Tensor& x) {
      return layers->forward(x);
    });
  }

  /// How many convolutions backward runs again.
  static int runs_again(const torch::Tensor& y) {
    const CountedOperators counted;
    y.sum().backward();
    return counted.count("aten::convolution");
  }

  int runs_again(const Options& options, nn::Sequential layers) {
    return runs_again(memcnn::checkpoint(options, layers, x_));
  }

  torch::Tensor x_ = leaf({2, kChannels, 6, 6});
};

// checkpoint()

TEST_F(CheckpointBudget, GradientsBuffersAndRandomNumbersEqualPlainOnes) {
  const auto expected = plain_step();
  for (const int64_t budget : {int64_t{1}, kResult, 2 * kResult, kMuch}) {
    for (const bool early_stop : {true, false}) {
      for (const bool debug : {false, true}) {
        const auto options = with(budget).early_stop(early_stop).debug(debug);
        const auto found =
            step([&](nn::Sequential& layers, const torch::Tensor& x) {
              return memcnn::checkpoint(options, layers, x);
            });
        EXPECT_TRUE(all_equal(found, expected))
            << budget << early_stop << debug;
      }
    }
  }
}

TEST_F(CheckpointBudget, KeptConvolutionsDoNotRunAgain) {
  const int64_t norms = 2 * kStatistics; // which are worth more
  EXPECT_EQ(runs_again(with(0), network()), 3);
  EXPECT_EQ(runs_again(with(norms + kResult - 1), network()), 3);
  EXPECT_EQ(runs_again(with(norms + kResult), network()), 2);
  EXPECT_EQ(runs_again(with(kAllOfNetwork), network()), 0);
  const auto whole = [](int64_t budget) {
    return with(budget).early_stop(false);
  };
  EXPECT_EQ(runs_again(whole(0), network()), 4);
  EXPECT_EQ(runs_again(whole(kAllOfNetwork), network()), 1);
  EXPECT_EQ(runs_again(whole(kAllOfNetwork + kResult), network()), 0);
}

TEST_F(CheckpointBudget, TheBestByMultiplyAddsAByteAreKept) {
  nn::Sequential layers(
      convolution(),
      nn::Tanh(),
      nn::Conv2d(nn::Conv2dOptions(kChannels, kChannels, 5).padding(2)),
      nn::Tanh(),
      convolution(),
      nn::Tanh());
  layers->to(torch::kDouble);
  const auto kept = std::make_shared<KeptActivations>();
  memcnn::checkpoint(with(kResult).kept(kept), layers, x_);
  EXPECT_EQ(kept->results, 1u);
  EXPECT_DOUBLE_EQ(kept->spared / kept->multiply_adds, 25. / (9 + 25 + 9));
}

TEST_F(CheckpointBudget, WhatIsKeptIsTold) {
  const auto kept = std::make_shared<KeptActivations>();
  const Options options = with(kAllOfNetwork).kept(kept);
  nn::Sequential layers = network();
  memcnn::checkpoint(options, layers, x_);
  EXPECT_EQ(kept->bytes, kAllOfNetwork);
  EXPECT_EQ(kept->blocks, 0u);
  EXPECT_EQ(kept->results, 5u);
  EXPECT_EQ(kept->spared, kept->multiply_adds);
  EXPECT_GT(kept->multiply_adds, 3. * kResult / 8 * kChannels * 9);

  const torch::NoGradGuard no_grad; // nothing is kept, nothing told
  memcnn::checkpoint(options, layers, x_);
  EXPECT_EQ(kept->results, 5u);
}

TEST_F(CheckpointBudget, MemoryStaysWithinTheBudgetAndGoesInBackward) {
  nn::Sequential layers = network();
  runs_again(with(0), layers); // allocates gradients
  const auto held = [&](int64_t budget) {
    const memcnn::AllocationMeter meter;
    {
      const torch::Tensor y = memcnn::checkpoint(with(budget), layers, x_);
      const int64_t in_forward = meter.held_bytes();
      y.sum().backward();
      EXPECT_LE(meter.held_bytes(), kResult) << "y";
      return in_forward;
    }
  };
  const int64_t unavoidable = held(0);
  for (int64_t budget = 0; budget <= 4 * kResult; budget += kResult / 2) {
    EXPECT_LE(held(budget), unavoidable + budget) << budget;
  }
  EXPECT_EQ(held(kAllOfNetwork), unavoidable + kAllOfNetwork);
}

TEST_F(CheckpointBudget, MemoryIsNeverAboveTheBudgetInForward) {
  const memcnn::AllocationMeter meter;
  int64_t most = 0;
  nn::Sequential layers;
  for (int i = 0; i < 12; ++i) {
    layers->push_back(convolution());
    layers->push_back(relu(/*in_place=*/true));
    layers->push_back(nn::Functional([&](const torch::Tensor& x) {
      most = std::max(most, meter.held_bytes());
      return x;
    }));
  }
  layers->to(torch::kDouble);
  const int64_t before = meter.held_bytes();
  for (const int64_t budget : {int64_t{0}, 3 * kResult, 5 * kResult + 1}) {
    most = 0;
    memcnn::checkpoint(with(budget), layers, x_);
    // A module's argument and its result.
    EXPECT_LE(most - before, budget + 2 * kResult + kStates) << budget;
  }
}

TEST_F(CheckpointBudget, RetainedGraphsAndSecondDerivatives) {
  nn::Sequential layers(convolution(), nn::Tanh(), convolution(), nn::Tanh());
  layers->to(torch::kDouble);
  std::vector<torch::Tensor> all = layers->parameters();
  all.push_back(x_);
  const auto second = [&](const torch::Tensor& y) {
    const auto first =
        torch::autograd::grad({y.pow(3).sum()}, all, {}, {}, true);
    return torch::autograd::grad({first.back().square().sum()}, all);
  };
  for (const bool early_stop : {true, false}) {
    const auto options = with(kMuch).early_stop(early_stop);
    EXPECT_LT(
        relative_error(
            second(memcnn::checkpoint(options, layers, x_ * 1)),
            second(layers->forward(x_ * 1))),
        kSecondDerivativeFloat64);

    const torch::Tensor y = memcnn::checkpoint(options, layers, x_ * 1).sum();
    for (const bool retain : {true, true, false}) {
      const CountedOperators counted;
      const auto found = torch::autograd::grad({y}, all, {}, retain);
      EXPECT_EQ(counted.count("aten::convolution"), 0);
      EXPECT_TRUE(all_equal(
          found, torch::autograd::grad({layers->forward(x_ * 1).sum()}, all)));
    }
  }
}

/// Two tensors in, two out.
struct CrossImpl final : nn::Cloneable<CrossImpl> {
  CrossImpl() {
    reset();
  }
  void reset() override {
    first = register_module("first", convolution());
    second = register_module("second", convolution());
  }
  std::tuple<torch::Tensor, torch::Tensor> forward(
      torch::Tensor a,
      torch::Tensor b) {
    torch::Tensor x = first(a).relu_();
    torch::Tensor y = second(b);
    return {x * y.sigmoid(), y}; // one of them is a kept result
  }
  nn::Conv2d first{nullptr}, second{nullptr};
};
TORCH_MODULE(Cross);

TEST_F(CheckpointBudget, SeveralInputsAndOutputs) {
  Cross cross;
  cross->to(torch::kDouble);
  std::vector<torch::Tensor> all = cross->parameters();
  const torch::Tensor b = leaf(x_.sizes());
  all.insert(all.end(), {x_, b});
  const auto gradients = [&](const auto& outputs) {
    torch::Tensor y = std::get<1>(outputs);
    return torch::autograd::grad(
        {(std::get<0>(outputs).pow(3) + (y * y)).sum()}, all);
  };
  const auto expected = gradients(cross->forward(x_ * 1, b * 1));
  for (const bool early_stop : {true, false}) {
    const auto options = with(kMuch).early_stop(early_stop);
    const auto outputs = memcnn::checkpoint(options, cross, x_ * 1, b * 1);
    const CountedOperators counted;
    EXPECT_TRUE(all_equal(gradients(outputs), expected));
    EXPECT_EQ(counted.count("aten::convolution"), 0);
  }
}

TEST_F(CheckpointBudget, AnOutputThatIsAKeptResultMayBeWritten) {
  Cross cross;
  cross->to(torch::kDouble);
  const auto gradient = [&](const auto& outputs) {
    std::get<1>(outputs).mul_(2);
    return torch::autograd::grad(
        {(std::get<0>(outputs) * std::get<1>(outputs)).sum()}, {x_})[0];
  };
  const torch::Tensor expected = gradient(cross->forward(x_ * 1, x_ * 1));
  for (const bool early_stop : {true, false}) {
    const auto options = with(kMuch).early_stop(early_stop);
    const auto outputs = memcnn::checkpoint(options, cross, x_ * 1, x_ * 1);
    EXPECT_TRUE(gradient(outputs).equal(expected));
  }
}

TEST_F(CheckpointBudget, AttentionAndLinearLayers) {
  nn::TransformerEncoderLayer layer(
      nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(32));
  const torch::Tensor x = leaf({5, 3, 16}, torch::kFloat);
  std::vector<torch::Tensor> all = layer->parameters();
  all.push_back(x);
  const auto gradients = [&](const auto& run) {
    torch::manual_seed(3);
    return torch::autograd::grad({run(x * 1).square().sum()}, all);
  };
  const torch::Tensor mask = torch::zeros({5, 5});
  const torch::Tensor padding = torch::zeros({3, 5}, torch::kBool);
  const auto expected = gradients(
      [&](const torch::Tensor& input) { return layer(input, mask, padding); });
  for (const int64_t budget : {int64_t{4} * 5 * 3 * 16, kMuch}) {
    const auto found = gradients([&](const torch::Tensor& input) {
      return memcnn::checkpoint(with(budget), layer, input, mask, padding);
    });
    EXPECT_TRUE(all_equal(found, expected)) << budget;
  }
}

TEST_F(CheckpointBudget, ResultsAreKeptInTheDtypeOfAutocast) {
  nn::Sequential layers(nn::Linear(16, 16), nn::Tanh(), nn::Linear(16, 16));
  const torch::Tensor x = leaf({5, 16}, torch::kFloat);
  std::vector<torch::Tensor> all = layers->parameters();
  all.push_back(x);
  const auto gradients = [&](const auto& run) {
    torch::Tensor y;
    {
      const Autocast autocast(torch::kCPU, torch::kBFloat16);
      y = run(x * 1);
    }
    return torch::autograd::grad({y.to(torch::kFloat).square().sum()}, all);
  };
  const auto expected = gradients(
      [&](const torch::Tensor& input) { return layers->forward(input); });
  for (const bool early_stop : {true, false}) {
    const auto kept = std::make_shared<KeptActivations>();
    const auto options = with(kMuch).early_stop(early_stop).kept(kept);
    const auto found = gradients([&](const torch::Tensor& input) {
      return memcnn::checkpoint(options, layers, input);
    });
    EXPECT_EQ(kept->results, early_stop ? 1u : 2u);
    EXPECT_EQ(kept->bytes, kept->results * 5 * 16 * 2);
    EXPECT_TRUE(all_equal(found, expected));
  }
}

TEST_F(CheckpointBudget, AfterAnExceptionConvolutionsRunAsAlways) {
  nn::Sequential layers(
      convolution(), nn::Functional([](const torch::Tensor& x) {
        static int runs = 0;
        if (++runs != 2) {
          throw std::domain_error("the module gave up");
        }
        return x.tanh();
      }));
  layers->to(torch::kDouble);
  const auto plain = [&] {
    const CountedOperators counted;
    convolution()->forward(x_.to(torch::kFloat));
    return counted.count("aten::convolution");
  };
  EXPECT_THROW(memcnn::checkpoint(with(kMuch), layers, x_), std::domain_error);
  EXPECT_EQ(plain(), 1);
  const torch::Tensor y = memcnn::checkpoint(with(kMuch), layers, x_);
  EXPECT_THROW(y.sum().backward(), std::domain_error);
  EXPECT_EQ(plain(), 1);
}

TEST_F(CheckpointBudget, ACheckpointWithinACheckpoint) {
  nn::Sequential inner = network();
  const auto gradients = [&](const auto& run) {
    nn::Sequential layers(
        convolution(),
        nn::Functional([&](const torch::Tensor& x) { return run(x); }),
        nn::Tanh());
    layers->register_module("inner", inner.ptr());
    for (auto& parameter : layers->parameters()) {
      torch::NoGradGuard no_grad;
      parameter.set_data(torch::ones_like(parameter).to(torch::kDouble) / 8);
    }
    std::vector<torch::Tensor> all = layers->parameters();
    all.push_back(x_);
    torch::manual_seed(3);
    return torch::autograd::grad(
        {memcnn::checkpoint(with(kResult), layers, x_).square().sum()}, all);
  };
  const auto expected =
      gradients([&](const torch::Tensor& x) { return inner->forward(x); });
  for (const bool early_stop : {true, false}) {
    const auto found = gradients([&](const torch::Tensor& x) {
      return memcnn::checkpoint(with(kMuch).early_stop(early_stop), inner, x);
    });
    EXPECT_TRUE(all_equal(found, expected));
  }
}

TEST_F(CheckpointBudget, ANegativeOneIsAnError) {
  nn::Sequential layers = network();
  EXPECT_THAT(
      [&] { memcnn::checkpoint(with(-1), layers, x_); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "checkpoint(): expected a memory_budget of 0 or more bytes, but got "
          "-1")));
}

// checkpoint_sequential()

/// Convolution, normalisation, ReLU, four times.
nn::Sequential four_layers() {
  nn::Sequential layers;
  for (int i = 0; i < 4; ++i) {
    layers->push_back(convolution());
    layers->push_back(nn::BatchNorm2d(kChannels));
    layers->push_back(relu(/*in_place=*/true));
  }
  layers->to(torch::kDouble);
  return layers;
}
/// Of what a layer's graph saves: the results of convolution and ReLU.
constexpr int64_t kGraph = 2 * kResult + kStatistics;

TEST_F(CheckpointBudget, OfSegmentsGradientsEqualPlainOnes) {
  const auto expected = plain_step();
  for (const int64_t segments : {1, 3}) { // that begin not in place
    for (int64_t budget = 0; budget <= 10 * kResult; budget += kResult / 2) {
      for (const bool early_stop : {true, false}) {
        const auto options = within(segments, budget).early_stop(early_stop);
        const auto found =
            step([&](nn::Sequential& layers, const torch::Tensor& x) {
              return memcnn::checkpoint_sequential(options, layers, x);
            });
        EXPECT_TRUE(all_equal(found, expected))
            << segments << " segments, budget " << budget << early_stop;
      }
    }
  }
}

TEST_F(CheckpointBudget, OfSegmentsKeepsResultsBeforeGraphs) {
  nn::Sequential layers = four_layers();
  const auto kept = std::make_shared<KeptActivations>();
  const auto expect_kept = [&](int64_t budget, size_t graphs, size_t results) {
    const torch::Tensor y =
        memcnn::checkpoint_sequential(within(4, budget).kept(kept), layers, x_);
    EXPECT_EQ(kept->blocks, graphs) << budget;
    EXPECT_EQ(kept->results, results) << budget;
    EXPECT_LE(kept->bytes, budget);
    return runs_again(y);
  };
  const int64_t norms = 4 * kStatistics;
  EXPECT_EQ(expect_kept(norms + 2 * kResult, 0, 6), 2);
  EXPECT_EQ(expect_kept(norms + 4 * kResult, 0, 8), 0);
  EXPECT_EQ(expect_kept(4 * kGraph, 4, 0), 0);
}

TEST_F(CheckpointBudget, OfSegmentsIsNeverExceeded) {
  nn::Sequential layers = four_layers();
  memcnn::checkpoint_sequential(within(4, 0), layers, x_).sum().backward();
  const auto held = [&](int64_t budget) {
    const memcnn::AllocationMeter meter;
    const torch::Tensor y =
        memcnn::checkpoint_sequential(within(4, budget), layers, x_);
    return meter.held_bytes();
  };
  const int64_t unavoidable = held(0);
  for (int64_t budget = 0; budget <= 4 * kGraph; budget += kResult / 2) {
    EXPECT_LE(held(budget), unavoidable + budget) << budget;
  }
  const memcnn::AllocationMeter meter;
  memcnn::checkpoint_sequential(within(4, kMuch), layers, x_).sum().backward();
  EXPECT_EQ(meter.held_bytes(), 0);
}

TEST_F(CheckpointBudget, OfSegmentsMoreKeepsMore) {
  nn::Sequential layers = four_layers();
  int before = 4;
  for (int64_t budget = 0; budget <= 4 * kGraph; budget += kResult / 4) {
    const int again = runs_again(
        memcnn::checkpoint_sequential(within(2, budget), layers, x_));
    EXPECT_LE(again, before) << budget;
    before = again;
  }
  EXPECT_EQ(before, 0);
}

TEST_F(CheckpointBudget, AResultThatItsGraphOutranksTakesNothingBesideIt) {
  nn::Sequential layers; // ReLU saves its own result, not the convolution's
  for (int i = 0; i < 4; ++i) {
    layers->push_back(convolution());
    layers->push_back(relu(/*in_place=*/i % 2 == 0));
  }
  layers->to(torch::kDouble);
  const auto kept = std::make_shared<KeptActivations>();
  memcnn::checkpoint_sequential(within(4, 4 * kResult).kept(kept), layers, x_);
  EXPECT_EQ(kept->blocks, 4u);
  EXPECT_EQ(kept->bytes, 4 * kResult);
}

TEST_F(CheckpointBudget, OfSegmentsWithoutEarlyStopKeepsResultsAlone) {
  nn::Sequential layers = four_layers();
  const auto kept = std::make_shared<KeptActivations>();
  const torch::Tensor y = memcnn::checkpoint_sequential(
      within(2, kMuch).early_stop(false).kept(kept), layers, x_);
  EXPECT_EQ(kept->blocks, 0u);
  EXPECT_EQ(kept->results, 8u);
  EXPECT_EQ(runs_again(y), 0);
}

TEST_F(CheckpointBudget, OfASegmentAroundACheckpointKeepsResults) {
  nn::Sequential inner = network();
  nn::Functional call(
      [&](const torch::Tensor& x) { return memcnn::checkpoint(inner, x); });
  call->register_module("inner", inner.ptr());
  nn::Sequential layers(nn::Tanh(), call, nn::Tanh());
  std::vector<torch::Tensor> all = layers->parameters();
  all.push_back(x_);
  const auto gradients = [&](int64_t budget) {
    torch::manual_seed(3);
    const auto kept = std::make_shared<KeptActivations>();
    const torch::Tensor y =
        memcnn::checkpoint_sequential(within(1, budget).kept(kept), layers, x_);
    EXPECT_EQ(kept->blocks, 0u); // its graph is of no use
    EXPECT_EQ(kept->results, budget > 0 ? 6u : 0u);
    return torch::autograd::grad({y.square().sum()}, all);
  };
  EXPECT_TRUE(all_equal(gradients(kMuch), gradients(0)));
}

} // namespace
} // namespace memcnn_test
