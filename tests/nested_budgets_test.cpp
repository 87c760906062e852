// SPDX-License-Identifier: MIT
//
// Budgets inside of budgets, and beside each other in several threads.

#include "support/counted_operators.h"
#include "support/tolerances.h"
#include "support/twins.h"
#include "support/ways.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kChannels = 8; // of a half of the outer couplings
constexpr int64_t kMuch = int64_t{1} << 30; // bytes

torch::nn::Sequential conv_branch(int64_t channels) {
  return torch::nn::Sequential(
      torch::nn::Conv2d(
          torch::nn::Conv2dOptions(channels, channels, 3).padding(1)),
      torch::nn::ReLU(torch::nn::ReLUOptions(/*inplace=*/true)),
      torch::nn::Conv2d(
          torch::nn::Conv2dOptions(channels, channels, 3).padding(1)),
      torch::nn::Tanh());
}

auto conv_coupling(int64_t channels) {
  return memcnn::AdditiveCoupling(
      conv_branch(channels / 2), conv_branch(channels / 2));
}

/// A sequence whose branches save memory themselves, in some way.
memcnn::ReversibleSequence nested(Way inner) {
  torch::manual_seed(1);
  const auto branch = [&] {
    torch::nn::Sequential layers;
    layers->push_back(torch::nn::Conv2d(
        torch::nn::Conv2dOptions(kChannels, kChannels, 3).padding(1)));
    layers->push_back(run_in(inner, conv_coupling(kChannels)));
    layers->push_back(torch::nn::Tanh());
    return layers;
  };
  memcnn::ReversibleSequence sequence{memcnn::ReversibleSequenceOptions()};
  for (int i = 0; i < 3; ++i) {
    sequence->push_back(memcnn::AdditiveCoupling(branch(), branch()));
  }
  sequence->to(torch::kDouble);
  return sequence;
}

class NestedBudgets : public testing::TestWithParam<Way> {
 protected:
  Tensor forward(int64_t budget) {
    sequence_->options.memory_budget(budget);
    return sequence_(x_ * 1).square().sum();
  }

  Tensors gradients(const Tensor& loss, bool create_graph = false) {
    Tensors sources = sequence_->parameters();
    sources.push_back(x_);
    return torch::autograd::grad(
        {loss}, sources, {}, /*retain_graph=*/create_graph, create_graph);
  }

  Tensors second_derivatives(const Tensor& loss) {
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (const Tensor& gradient : gradients(loss, /*create_graph=*/true)) {
      sum = sum + gradient.square().sum();
    }
    return gradients(sum);
  }

  Tensor plain() {
    const memcnn::PlainAutogradGuard guard;
    return forward(0);
  }

  /// From nothing to all.
  std::vector<int64_t> budgets() {
    memcnn::AllocationMeter meter;
    const Tensor loss = plain();
    std::vector<int64_t> result;
    for (int i = 0; i <= 6; ++i) {
      result.push_back(meter.held_bytes() * i / 6);
    }
    result.push_back(kMuch);
    return result;
  }

  memcnn::ReversibleSequence sequence_ = nested(GetParam());
  Tensor x_ = leaf({2, 2 * kChannels, 6, 6});
};

INSTANTIATE_TEST_SUITE_P(Ways, NestedBudgets, saving_ways(), way_name);

TEST_P(NestedBudgets, GradientsEqualPlainOnes) {
  const Tensors expected = gradients(plain());
  for (const int64_t budget : budgets()) {
    for (int step = 0; step < 2; ++step) {
      EXPECT_LT(
          relative_error(gradients(forward(budget)), expected),
          kGradientFloat64)
          << budget << ", step " << step;
    }
  }
}

TEST_P(NestedBudgets, SecondDerivativesEqualPlainOnes) {
  const Tensors expected = second_derivatives(plain());
  for (const int64_t budget : budgets()) {
    for (int step = 0; step < 2; ++step) {
      EXPECT_LT(
          relative_error(second_derivatives(forward(budget)), expected),
          kSecondDerivativeFloat64)
          << budget << ", step " << step;
    }
  }
}

TEST_P(NestedBudgets, NothingIsLeftAfterwards) {
  gradients(plain());
  const memcnn::AllocationMeter meter;
  for (const int64_t budget : budgets()) {
    forward(budget);
    gradients(forward(budget));
    EXPECT_EQ(meter.held_bytes(), 0) << budget;
  }
}

TEST(Budgets, OfASequenceAreBesideThatOfASequenceInIt) {
  torch::manual_seed(1);
  memcnn::ReversibleSequence inner(conv_coupling(8), conv_coupling(8));
  memcnn::ReversibleSequence outer(conv_coupling(8), inner, conv_coupling(8));
  outer->to(torch::kDouble);
  const Tensor x = leaf({2, 8, 6, 6});
  const auto gradients = [&] {
    Tensors sources = outer->parameters();
    sources.push_back(x);
    return torch::autograd::grad({outer(x * 1).square().sum()}, sources);
  };
  outer->options.disable(true);
  const Tensors expected = gradients();
  outer->options.disable(false);
  const auto nbytes = static_cast<int64_t>(x.nbytes());
  for (const int64_t budget : {int64_t{0}, 2 * nbytes, 4 * nbytes, kMuch}) {
    for (const int64_t inside : {int64_t{0}, nbytes, 2 * nbytes, kMuch}) {
      outer->options.memory_budget(budget);
      inner->options.memory_budget(inside);
      for (int step = 0; step < 3; ++step) {
        EXPECT_LT(relative_error(gradients(), expected), kGradientFloat64)
            << budget << " and " << inside << ", step " << step;
      }
    }
  }
}

/// Two steps of a network of its own.
class Trainee {
 public:
  explicit Trainee(int64_t budget) {
    torch::manual_seed(1);
    sequence_->push_back(conv_coupling(8));
    sequence_->push_back(conv_coupling(8));
    sequence_->to(torch::kDouble);
    sequence_->options.memory_budget(budget);
    x_ = leaf({2, 8, 6, 6});
  }

  void train(int steps) {
    for (int step = 0; step < steps; ++step) {
      gradients_ = torch::autograd::grad(
          {sequence_(x_ * 1).square().sum()}, sequence_->parameters());
    }
  }
  const Tensors& gradients() const {
    return gradients_;
  }

 private:
  memcnn::ReversibleSequence sequence_{memcnn::ReversibleSequenceOptions()};
  Tensor x_;
  Tensors gradients_;
};

TEST(Budgets, OfOneThreadAreNoneOfAnother) {
  constexpr int kSteps = 30;
  Trainee alone(0);
  alone.train(1);
  // The first budget of a program meets threads that compute without one.
  Trainee without(0);
  Trainee with(kMuch);
  Trainee with_some(1000);
  std::thread first([&] { without.train(kSteps); });
  std::thread second([&] { with.train(kSteps); });
  with_some.train(kSteps);
  first.join();
  second.join();
  for (const Trainee* each : {&without, &with, &with_some}) {
    EXPECT_LT(
        relative_error(each->gradients(), alone.gradients()), kGradientFloat64);
  }
}

/// Throws after its convolution.
struct FailingBranchImpl final : torch::nn::Cloneable<FailingBranchImpl> {
  FailingBranchImpl() {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).padding(1)));
  }
  Tensor forward(const Tensor& x) {
    const Tensor y = conv(x);
    if (fails) {
      throw std::domain_error("the branch gave up");
    }
    return y;
  }

  torch::nn::Conv2d conv{nullptr};
  bool fails = false;
};
TORCH_MODULE(FailingBranch);

TEST(Budgets, OfARunThatFailedAreForgotten) {
  FailingBranch branch;
  memcnn::InvertibleModuleWrapper wrapper(
      memcnn::AdditiveCoupling(branch, branch),
      memcnn::InvertibleModuleWrapperOptions().memory_budget(kMuch));
  const Tensor x = leaf({2, 8, 6, 6}, torch::kFloat);
  const memcnn::AllocationMeter meter;
  const auto expect_nothing_kept = [&] {
    branch->fails = false;
    const torch::NoGradGuard no_grad;
    const CountedOperators counted;
    branch(x.narrow(1, 0, 4));
    EXPECT_EQ(
        counted.counts(), (CountedOperators::Counts{{"aten::convolution", 1}}));
    EXPECT_EQ(meter.held_bytes(), 0);
  };
  branch->fails = true;
  EXPECT_ANY_THROW(wrapper(x * 1));
  expect_nothing_kept();
  {
    const Tensor loss = wrapper(x * 1).sum();
    branch->fails = true;
    EXPECT_ANY_THROW(loss.backward());
  }
  expect_nothing_kept();
}

} // namespace
} // namespace memcnn_test
