// SPDX-License-Identifier: MIT
//
// Note [Streams of a sequence], rule by rule.

#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/seen_operators.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using torch::nn::AnyModule;

class Streams : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

// Rule 1: between couplings of one split_dim halves travel as two tensors.

TEST_F(Streams, Rule1HalvesAreTensorsOfTheirOwnInBothDirections) {
  std::vector<bool> own_memory;
  Chain chain = Chain::make(3, [&] {
    return AnyModule(ProbedLinear(4, [&](const torch::Tensor& half) {
      own_memory.push_back(
          half.is_contiguous() && half.storage().nbytes() == half.nbytes());
    }));
  });
  const torch::Tensor y =
      chain.run(Engine::kSequence, leaf({3, 8}, torch::kFloat) * 2);
  EXPECT_EQ(std::count(own_memory.begin(), own_memory.end(), true), 6);
  EXPECT_EQ(own_memory.size(), 6u);
  own_memory.clear();
  y.sum().backward();
  EXPECT_EQ(std::count(own_memory.begin(), own_memory.end(), true), 6);
  EXPECT_EQ(own_memory.size(), 6u);
}

// Halves of a channels-last tensor are channels-last tensors: with gaps between
// their pixels, or converted in every block, kernels would be much slower.
TEST_F(Streams, Rule1HalvesAndGradientsKeepTheMemoryFormat) {
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  for (const Engine engine : {Engine::kWrapper, Engine::kSequence}) {
    std::vector<bool> kept;
    const auto probe = [&](const torch::Tensor& tensor) {
      kept.push_back(tensor.is_contiguous(kChannelsLast));
    };
    Chain chain =
        Chain::make(2, [&] { return AnyModule(ProbedProduct(probe)); });
    const torch::Tensor x = leaf({3, 8, 5, 5}, torch::kFloat);
    const torch::Tensor y =
        chain.run(engine, (x * 2).contiguous(kChannelsLast));
    EXPECT_TRUE(y.is_contiguous(kChannelsLast));
    EXPECT_EQ(kept, std::vector<bool>(4, true));
    kept.clear();
    // The gradient comes in another format, as it does from many losses.
    y.backward(torch::randn({3, 8, 5, 5}));
    EXPECT_EQ(kept, std::vector<bool>(8, true)); // arguments and gradients
  }
}

TEST_F(Streams, Rule1OtherSplitDimsAndModulesJoinAndSplitAgain) {
  using Rows =
      memcnn::AdditiveCoupling<torch::nn::AnyModule, torch::nn::AnyModule>;
  const auto linear = [](int64_t size) {
    torch::nn::AnyModule branch(torch::nn::Linear(size, size));
    branch.ptr()->to(torch::kDouble);
    return branch;
  };
  Rows rows(linear(4), linear(4), memcnn::CouplingOptions().split_dim(1));
  Rows columns(linear(2), linear(2), memcnn::CouplingOptions().split_dim(-1));
  const torch::Tensor x = leaf({3, 6, 4});
  memcnn::ReversibleSequence mixed(rows, columns, columns, rows);
  const torch::Tensor found = mixed(x * 2);
  EXPECT_TRUE(found.equal(rows(columns(columns(rows(x * 2))))));

  const auto gradient = torch::autograd::grad({found.square().sum()}, {x});
  const auto expected = torch::autograd::grad(
      {rows(columns(columns(rows(x * 2)))).square().sum()}, {x});
  EXPECT_LT(relative_error(gradient[0], expected[0]), kGradientFloat64);
}

/// How often operators join tensors while a call lasts.
template <class Call>
std::ptrdiff_t count_cats(const Call& call) {
  const std::vector<std::string> names = operators_of(call);
  return std::count(names.begin(), names.end(), "aten::cat");
}

TEST_F(Streams, Rule1ADimensionMayBeCountedFromTheEnd) {
  const auto flow_along = [](int64_t dim) {
    const auto options = memcnn::CouplingOptions().split_dim(dim);
    memcnn::ReversibleSequence flow;
    for (int step = 0; step < 3; ++step) {
      flow->push_back(memcnn::ActNorm(4));
      flow->push_back(memcnn::Conv1x1(4));
      flow->push_back(memcnn::AdditiveCoupling(ConvBranch(2), options));
      flow->push_back(memcnn::SwapHalves());
      flow->push_back(memcnn::AdditiveCoupling(ConvBranch(2)));
    }
    return flow;
  };
  const torch::Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
  const auto cats_along = [&](int64_t dim, bool backward) {
    memcnn::ReversibleSequence flow = flow_along(dim);
    return count_cats([&] {
      const at::AutoGradMode mode(backward);
      const torch::Tensor y = flow(x * 2);
      if (backward) {
        y.sum().backward();
      }
    });
  };
  // The first ActNorm gets a whole; the output is one.
  EXPECT_EQ(cats_along(1, /*backward=*/false), 1);
  EXPECT_EQ(cats_along(-3, /*backward=*/false), 1);
  EXPECT_EQ(
      cats_along(-3, /*backward=*/true), cats_along(1, /*backward=*/true));
}

// Rule 2: in place on what the sequence owns, never on the caller's.

TEST_F(Streams, Rule2UpdatesItsOwnTensorsInPlace) {
  std::vector<const void*> halves;
  Chain chain = Chain::make(4, [&] {
    return AnyModule(ProbedLinear(4, [&](const torch::Tensor& half) {
      halves.push_back(half.const_data_ptr());
    }));
  });
  const torch::Tensor x = leaf({3, 8}, torch::kFloat) * 2;
  const torch::Tensor values = x.detach().clone();
  const torch::Tensor y = chain.run(Engine::kSequence, x);
  // F sees the second half, G the first; each stays where it is after block 0.
  for (size_t i = 3; i < halves.size(); ++i) {
    EXPECT_EQ(halves[i], halves[i == 3 ? 1 : i - 2]) << i;
  }
  EXPECT_TRUE(x.equal(values)) << "the caller's input";

  const torch::Tensor y_values = y.detach().clone();
  y.sum().backward();
  EXPECT_TRUE(x.equal(values)) << "the caller's input, after backward";
  EXPECT_TRUE(y.equal(y_values)) << "the caller's output, after backward";
}

TEST_F(Streams, Rule2LeavesTheCallersGradientAlone) {
  Chain chain =
      Chain::make(2, [] { return AnyModule(ProbedLinear(4, [](auto&) {})); });
  const torch::Tensor y =
      chain.run(Engine::kSequence, leaf({3, 8}, torch::kFloat) * 2);
  const torch::Tensor gradient = torch::randn_like(y);
  const torch::Tensor values = gradient.clone();
  y.backward(gradient);
  EXPECT_TRUE(gradient.equal(values));
}

// Rule 3: memory does not grow with depth.

struct Memory {
  int64_t held;
  int64_t peak;
};

Memory memory_of(size_t depth) {
  Chain chain = Chain::make(depth, [] { return AnyModule(ConvBranch(4)); });
  const torch::Tensor x = leaf({4, 8, 16, 16}, torch::kFloat);
  int64_t gradients = 0;
  for (const torch::Tensor& parameter : chain.parameters()) {
    gradients += static_cast<int64_t>(parameter.nbytes());
  }
  memcnn::AllocationMeter meter;
  const torch::Tensor loss =
      chain.run(Engine::kSequence, made_by_a_layer(x)).sum();
  const int64_t held = meter.held_bytes();
  loss.backward();
  return {held, meter.peak_bytes() - gradients};
}

TEST_F(Streams, Rule3HeldAfterForwardIsTheSameAtDepth3And30And300) {
  const Memory at3 = memory_of(3);
  const Memory at30 = memory_of(30);
  const Memory at300 = memory_of(300);
  EXPECT_EQ(at3.held, at30.held);
  EXPECT_EQ(at3.held, at300.held);
  EXPECT_LE(
      static_cast<double>(at300.peak), 1.05 * static_cast<double>(at30.peak));
}

} // namespace
} // namespace memcnn_test
