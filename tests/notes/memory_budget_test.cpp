// SPDX-License-Identifier: MIT
//
// Note [Memory budget], rule by rule.

#include "../support/counted_operators.h"
#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <torch/csrc/autograd/profiler_legacy.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

constexpr size_t kDepth = 6;
constexpr int64_t kMuch = int64_t{1} << 30; // bytes

/// A sequence whose blocks count the runs of their branches, with a graph and
/// without one.
class MemoryBudget : public testing::Test {
 protected:
  struct Runs {
    int with_graph = 0;
    int without_graph = 0;

    bool operator==(const Runs& other) const {
      return with_graph == other.with_graph &&
          without_graph == other.without_graph;
    }
  };

  void SetUp() override {
    torch::manual_seed(1);
    for (size_t i = 0; i < kDepth; ++i) {
      const auto branch = [this, i] {
        return ProbedLinear(64, [this, i](const torch::Tensor&) {
          Runs& runs = runs_[i];
          ++(torch::GradMode::is_enabled() ? runs.with_graph
                                           : runs.without_graph);
        });
      };
      sequence_->push_back(memcnn::AdditiveCoupling(branch(), branch()));
    }
    runs_.resize(kDepth);
  }

  torch::Tensor forward(int64_t budget) {
    sequence_->options.memory_budget(budget);
    runs_.assign(kDepth, Runs());
    return sequence_(x_ * 1).square().sum();
  }

  std::vector<torch::Tensor> gradients(const torch::Tensor& loss) {
    std::vector<torch::Tensor> sources = sequence_->parameters();
    sources.push_back(x_);
    return torch::autograd::grad({loss}, sources);
  }

  /// A budget in which some blocks have room, but not all.
  int64_t budget_for_some() {
    memcnn::AllocationMeter meter;
    const torch::Tensor loss = forward(kMuch);
    return meter.held_bytes() / 2;
  }

  std::vector<Runs> runs_;
  memcnn::ReversibleSequence sequence_{memcnn::ReversibleSequenceOptions()};
  torch::Tensor x_ = leaf({32, 128}, torch::kFloat);
};

// Rule 1: measured when it runs; the second step of a kind knows.

TEST_F(MemoryBudget, Rule1OldestBlocksMakeRoomAndTheSecondStepKnows) {
  const int64_t budget = budget_for_some();
  sequence_->options.memory_budget(0); // another kind of run in between
  forward(0);
  forward(budget);
  const size_t kept = sequence_->kept_blocks();
  ASSERT_GT(kept, 0u);
  ASSERT_LT(kept, kDepth);
  EXPECT_EQ(runs_, std::vector<Runs>(kDepth, Runs{2, 0}));
  forward(budget);
  EXPECT_EQ(sequence_->kept_blocks(), kept);
  for (size_t i = 0; i < kDepth; ++i) {
    EXPECT_EQ(runs_[i], i < kDepth - kept ? (Runs{0, 2}) : (Runs{2, 0})) << i;
  }
}

TEST_F(MemoryBudget, Rule1WhatIsKeptStaysWithinTheBudget) {
  memcnn::AllocationMeter meter;
  const torch::Tensor none = forward(0);
  const int64_t unavoidable = meter.held_bytes();
  for (const int64_t budget : {50'000, 100'000, 200'000, 400'000}) {
    memcnn::AllocationMeter added;
    const torch::Tensor loss = forward(budget);
    EXPECT_LE(added.held_bytes(), unavoidable + budget) << budget;
  }
}

// Rule 2: of blocks that are worth the same the last are kept, in the order of
// the direction.

TEST_F(MemoryBudget, Rule2TheLastBlocksDoNotRunAgain) {
  const torch::Tensor loss = forward(budget_for_some());
  const size_t kept = sequence_->kept_blocks();
  runs_.assign(kDepth, Runs());
  gradients(loss);
  for (size_t i = 0; i < kDepth; ++i) {
    EXPECT_EQ(runs_[i], i < kDepth - kept ? (Runs{2, 0}) : (Runs{0, 0})) << i;
  }
}

TEST_F(MemoryBudget, Rule2InAnInverseTheFirstBlocksAreTheLast) {
  sequence_->options.memory_budget(budget_for_some());
  const torch::Tensor loss = sequence_->inverse(x_ * 1).square().sum();
  const size_t kept = sequence_->kept_blocks();
  ASSERT_GT(kept, 0u);
  ASSERT_LT(kept, kDepth);
  runs_.assign(kDepth, Runs());
  gradients(loss);
  for (size_t i = 0; i < kDepth; ++i) {
    EXPECT_EQ(runs_[i], i < kept ? (Runs{0, 0}) : (Runs{2, 0})) << i;
  }
}

// Rule 3: gradients are those without a budget.

TEST_F(MemoryBudget, Rule3GradientsAreTheSameForEveryBudget) {
  sequence_->to(torch::kDouble);
  x_ = leaf({32, 128});
  const int64_t some = budget_for_some();
  const auto expected = gradients(forward(0));
  for (const int64_t budget : {some / 2, some, kMuch}) {
    EXPECT_LT(
        relative_error(gradients(forward(budget)), expected), kGradientFloat64);
  }
}

TEST_F(MemoryBudget, Rule3AnInputWithoutAGradientIsNoMatter) {
  sequence_->options.memory_budget(kMuch);
  const torch::Tensor data = torch::randn({32, 128});
  const auto step = [&] {
    return torch::autograd::grad(
        {sequence_(data).square().sum()}, sequence_->parameters());
  };
  const auto found = step();
  EXPECT_EQ(sequence_->kept_blocks(), kDepth);
  sequence_->options.disable(true);
  EXPECT_LT(relative_error(found, step()), kGradientFloat32);
}

// Rule 4: inside a profiler the choice of an earlier step holds.

TEST_F(MemoryBudget, Rule4InsideAProfilerAnEarlierChoiceHolds) {
  const int64_t budget = budget_for_some();
  forward(0);
  const auto in_profiler = [&] {
    std::ostringstream trace;
    const torch::autograd::profiler::RecordProfile profiler(trace);
    forward(budget);
    return sequence_->kept_blocks();
  };
  EXPECT_EQ(in_profiler(), 0u) << "nothing is known yet";
  forward(budget);
  const size_t kept = sequence_->kept_blocks();
  ASSERT_GT(kept, 0u);
  EXPECT_EQ(in_profiler(), kept);
}

// Convolutions, whose results are worth more than what else blocks save.

constexpr int64_t kWidth = 16; // channels of a half

/// Blocks of two branches as in a RevNet, of which each has two results to keep:
/// of a convolution, and the statistics of batch normalisation.
class BudgetOfConvolutions : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    for (size_t i = 0; i < kDepth; ++i) {
      sequence_->push_back(memcnn::AdditiveCoupling(branch(), branch()));
    }
    sequence_->to(torch::kDouble);
  }

  static torch::nn::Sequential branch() {
    return torch::nn::Sequential(
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(kWidth, kWidth, 3).padding(1).bias(false)),
        torch::nn::BatchNorm2d(kWidth),
        torch::nn::ReLU(torch::nn::ReLUOptions(/*inplace=*/true)));
  }

  torch::Tensor forward(int64_t budget) {
    sequence_->options.memory_budget(budget);
    return sequence_(x_ * 1).square().sum();
  }

  std::vector<torch::Tensor> gradients(const torch::Tensor& loss) {
    std::vector<torch::Tensor> sources = sequence_->parameters();
    sources.push_back(x_);
    return torch::autograd::grad({loss}, sources);
  }

  std::vector<torch::Tensor> plain_gradients() {
    const memcnn::PlainAutogradGuard plain;
    return gradients(forward(0));
  }

  /// Bytes that a step holds after forward, and kept() in words.
  std::pair<int64_t, std::string> step(int64_t budget) {
    memcnn::AllocationMeter added;
    const torch::Tensor loss = forward(budget);
    const int64_t held = added.held_bytes();
    gradients(loss);
    return {held, c10::str(sequence_->kept())};
  }

  int64_t all_blocks() {
    forward(kMuch);
    return sequence_->kept().bytes;
  }

  int64_t all_results() const {
    return static_cast<int64_t>(kDepth) *
        (static_cast<int64_t>(x_.nbytes()) + 4 * kWidth * 8);
  }

  memcnn::ReversibleSequence sequence_{memcnn::ReversibleSequenceOptions()};
  torch::Tensor x_ = leaf({4, 2 * kWidth, 8, 8});
};

TEST_F(BudgetOfConvolutions, Rule1WhatIsKeptIsHeldAndWithinTheBudget) {
  const int64_t all = all_blocks();
  const auto [unavoidable, nothing] = step(0);
  for (int i = 0; i <= 16; ++i) {
    const int64_t budget = all * i / 16 + i % 3;
    SCOPED_TRACE(budget);
    for (int repetition = 0; repetition < 3; ++repetition) {
      const int64_t held = step(budget).first;
      EXPECT_LE(held, unavoidable + budget) << repetition;
      EXPECT_LE(held, unavoidable + sequence_->kept().bytes) << repetition;
    }
  }
}

TEST_F(BudgetOfConvolutions, Rule1TheSecondStepKeepsWhatTheFirstOneLeft) {
  const int64_t all = all_blocks();
  for (int i = 1; i < 8; ++i) {
    const auto first = step(all * i / 8);
    const auto second = step(all * i / 8);
    EXPECT_EQ(second.second, first.second) << i;
    EXPECT_EQ(second.first, first.first) << i;
  }
}

TEST_F(BudgetOfConvolutions, Rule1BackwardNeedsOneBlockBesideIt) {
  const auto peak_beside_held = [&](int64_t budget) {
    memcnn::AllocationMeter meter;
    const torch::Tensor loss = forward(budget);
    const int64_t held = meter.held_bytes();
    gradients(loss);
    return meter.peak_bytes() - held;
  };
  const int64_t all = all_blocks();
  const int64_t without = peak_beside_held(0);
  for (int i = 1; i <= 8; ++i) {
    step(all * i / 8); // whose forward has graphs that it gives up
    EXPECT_LE(peak_beside_held(all * i / 8), without) << i;
  }
}

TEST_F(BudgetOfConvolutions, Rule2ResultsComeFirstAndThenBlocks) {
  forward(all_results());
  EXPECT_EQ(sequence_->kept().blocks, 0u);
  EXPECT_EQ(sequence_->kept().results, 4 * kDepth);
  EXPECT_EQ(sequence_->kept().bytes, all_results());
  EXPECT_EQ(sequence_->kept().spared, sequence_->kept().multiply_adds);
  forward(kMuch);
  EXPECT_EQ(sequence_->kept().blocks, kDepth);
  EXPECT_EQ(sequence_->kept().results, 0u);
}

TEST_F(BudgetOfConvolutions, Rule2ResultsThatAreNotKeptRunAgain) {
  const auto convolutions = [](const CountedOperators& counted) {
    return counted.counts()["aten::convolution"];
  };
  for (int repetition = 0; repetition < 2; ++repetition) {
    const torch::Tensor loss = forward(all_results() / 2);
    // Half of them, and all statistics.
    EXPECT_EQ(sequence_->kept().results, 3 * kDepth - 1);
    const CountedOperators counted;
    gradients(loss);
    EXPECT_EQ(convolutions(counted), static_cast<int>(kDepth) + 1);
  }
}

TEST_F(BudgetOfConvolutions, Rule2ABudgetForNothingKeepsNothing) {
  for (const int64_t budget : {1, 7}) {
    const torch::Tensor loss = forward(budget);
    EXPECT_EQ(sequence_->kept().bytes, 0);
    EXPECT_EQ(sequence_->kept().results, 0u);
    EXPECT_LT(
        relative_error(gradients(loss), plain_gradients()), kGradientFloat64);
  }
}

TEST_F(BudgetOfConvolutions, Rule3GradientsAreRightAtEveryBudget) {
  const auto expected = plain_gradients();
  const int64_t all = all_blocks();
  for (int i = 0; i <= 16; ++i) {
    for (int repetition = 0; repetition < 2; ++repetition) {
      EXPECT_LT(
          relative_error(gradients(forward(all * i / 16)), expected),
          kGradientFloat64)
          << i;
    }
  }
}

TEST_F(BudgetOfConvolutions, Rule4InsideAProfilerResultsAloneAreKept) {
  std::ostringstream trace;
  const torch::autograd::profiler::RecordProfile profiler(trace);
  forward(kMuch);
  EXPECT_EQ(sequence_->kept().blocks, 0u);
  EXPECT_EQ(sequence_->kept().results, 4 * kDepth);
  EXPECT_EQ(sequence_->kept().bytes, all_results());
}

// Rule 5: segments choose while they run.

/// What segments keep.
memcnn::KeptActivations kept_of_segments(
    const std::vector<torch::nn::AnyModule>& modules,
    int64_t budget,
    int64_t segments = 4) {
  torch::nn::Sequential layers;
  for (int64_t i = 0; i < segments; ++i) {
    layers->push_back(torch::nn::Linear(256, 256));
    for (const torch::nn::AnyModule& module : modules) {
      layers->push_back(module);
    }
  }
  const auto kept = std::make_shared<memcnn::KeptActivations>();
  memcnn::checkpoint_sequential(
      memcnn::CheckpointSequentialOptions()
          .segments(segments)
          .memory_budget(budget)
          .kept(kept),
      layers,
      leaf({8, 256}, torch::kFloat));
  EXPECT_LE(kept->bytes, budget);
  return *kept;
}
constexpr int64_t kResult = 8 * 256 * 4; // bytes

TEST(MemoryBudgetOfSegments, Rule5ARunningSegmentPushesNoResultsOut) {
  const std::vector<torch::nn::AnyModule> modules = {
      torch::nn::AnyModule(torch::nn::Sigmoid()),
      torch::nn::AnyModule(torch::nn::Sigmoid())};
  // Results, of which the graphs have none, are worth four times as much.
  for (const int64_t budget : {1, 2, 3, 4, 5}) {
    const auto kept = kept_of_segments(modules, budget * kResult);
    EXPECT_EQ(kept.results, std::min(budget, int64_t{4})) << budget;
    EXPECT_EQ(kept.blocks, 0u) << budget;
  }
  const auto kept = kept_of_segments(modules, 6 * kResult);
  EXPECT_EQ(kept.results, 3u);
  EXPECT_EQ(kept.blocks, 1u);
  EXPECT_EQ(kept_of_segments(modules, kMuch).bytes, 8 * kResult);
}

TEST(MemoryBudgetOfSegments, Rule5NoResultGetsLostByAGraphThatIsGivenUp) {
  // The first of two results is the graph's as well, which has three tensors.
  const std::vector<torch::nn::AnyModule> modules = {
      torch::nn::AnyModule(torch::nn::GELU()),
      torch::nn::AnyModule(torch::nn::Linear(256, 256)),
      torch::nn::AnyModule(torch::nn::Sigmoid())};
  for (const int64_t segments : {2, 3, 5}) {
    const int64_t all = segments * 3 * kResult;
    for (int64_t budget = all * 2 / 3; budget <= all; budget += kResult / 4) {
      const auto kept = kept_of_segments(modules, budget, segments);
      EXPECT_EQ(2 * kept.blocks + kept.results, 2 * segments) << budget;
    }
  }
}

TEST(MemoryBudgetOfSegments, Rule5NothingIsKeptBesideGraphsThatAllHaveRoom) {
  const std::vector<torch::nn::AnyModule> modules = {
      torch::nn::AnyModule(torch::nn::Sigmoid()),
      torch::nn::AnyModule(torch::nn::Sigmoid())};
  const auto kept = kept_of_segments(modules, 8 * kResult);
  EXPECT_EQ(kept.blocks, 4u);
  EXPECT_EQ(kept.bytes, 8 * kResult);
}

TEST(
    MemoryBudgetOfSegments,
    Rule5AResultThatItsGraphOutlastsIsNotKeptBesideIt) {
  // Graphs take no more than results, and spare the ReLUs as well.
  const std::vector<torch::nn::AnyModule> modules = {
      torch::nn::AnyModule(torch::nn::ReLU())};
  for (const int64_t budget : {2, 3, 4}) {
    const auto kept = kept_of_segments(modules, budget * kResult);
    EXPECT_EQ(kept.blocks, budget) << budget;
    EXPECT_EQ(kept.bytes, budget * kResult) << budget;
  }
}

TEST(MemoryBudgetOfSegments, Rule5WhatAResultAndAGraphShareCountsOnce) {
  // GELU saves the result of the linear layer, and the next one its own.
  const std::vector<torch::nn::AnyModule> modules = {
      torch::nn::AnyModule(torch::nn::GELU()),
      torch::nn::AnyModule(torch::nn::Sigmoid())};
  const auto kept = kept_of_segments(modules, 8 * kResult);
  EXPECT_EQ(kept.blocks, 4u);
  EXPECT_EQ(kept.bytes, 8 * kResult);
}

} // namespace
} // namespace memcnn_test
