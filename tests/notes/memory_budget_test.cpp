// SPDX-License-Identifier: MIT
//
// Note [Memory budget], rule by rule.

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

// Rule 2: the last blocks are kept, in the order of the direction.

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
