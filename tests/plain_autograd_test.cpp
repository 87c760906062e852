// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/tolerances.h"
#include "support/twins.h"
#include "support/ways.h"

#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <stdexcept>
#include <string>
#include <thread>

namespace memcnn_test {
namespace {

/// Whether one of our nodes made a tensor.
bool saves_memory(const torch::Tensor& y) {
  return y.grad_fn()->name().find("InvertibleFunction") != std::string::npos;
}

using Additive = memcnn::AdditiveCoupling<SmoothBranch>;

class PlainAutogradGuard : public testing::TestWithParam<Way> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    module_ = run_in(GetParam(), Additive(SmoothBranch(2), SmoothBranch(2)));
    module_.ptr()->to(torch::kDouble);
  }

  std::vector<torch::Tensor> gradients_of(const torch::Tensor& y) {
    std::vector<torch::Tensor> sources = module_.ptr()->parameters();
    sources.push_back(x_);
    return torch::autograd::grad({y.square().sum()}, sources);
  }

  torch::nn::AnyModule module_;
  torch::Tensor x_ = leaf({2, 4, 3, 3});
};

TEST_P(PlainAutogradGuard, RunsAsPlainAutograd) {
  const torch::Tensor saving = module_.forward(x_ * 1);
  ASSERT_TRUE(saves_memory(saving));
  const auto expected = gradients_of(saving);
  const memcnn::PlainAutogradGuard guard;
  const torch::Tensor plain = module_.forward(x_ * 1);
  EXPECT_FALSE(saves_memory(plain));
  EXPECT_LT(relative_error(gradients_of(plain), expected), kGradientFloat64);
}

TEST_P(PlainAutogradGuard, LeavesGraphsFromOutsideAsTheyAre) {
  const torch::Tensor saving = module_.forward(x_ * 1);
  torch::Tensor plain;
  std::vector<torch::Tensor> found;
  {
    const memcnn::PlainAutogradGuard guard;
    found = gradients_of(saving);
    plain = module_.forward(x_ * 1);
  }
  EXPECT_LT(relative_error(found, gradients_of(plain)), kGradientFloat64);
}

TEST_P(PlainAutogradGuard, HoldsInItsScopeAndThread) {
  const auto saves = [&] {
    return saves_memory(module_.forward(x_ * 1));
  };
  {
    const memcnn::PlainAutogradGuard outer;
    EXPECT_TRUE(memcnn::PlainAutogradGuard::is_enabled());
    {
      const memcnn::PlainAutogradGuard inner(/*enabled=*/false);
      EXPECT_TRUE(saves());
    }
    EXPECT_FALSE(saves());
    try {
      const memcnn::PlainAutogradGuard inner;
      throw std::runtime_error("");
    } catch (const std::runtime_error&) {
    }
    EXPECT_FALSE(saves()) << "an inner guard ended the outer one's";
    bool in_other_thread = false;
    std::thread([&] { in_other_thread = saves(); }).join();
    EXPECT_TRUE(in_other_thread);
  }
  EXPECT_FALSE(memcnn::PlainAutogradGuard::is_enabled());
  EXPECT_TRUE(saves());
}

INSTANTIATE_TEST_SUITE_P(Ways, PlainAutogradGuard, saving_ways(), way_name);

/// A branch that saves memory itself, so that its second run does, too.
TEST(PlainAutogradGuardInBackward, RunsNestedModulesAsPlainAutograd) {
  torch::manual_seed(1);
  using Nested = CheckpointedImpl<SmoothBranch>;
  memcnn::ReversibleSequence sequence(memcnn::AdditiveCoupling(
      torch::nn::AnyModule(std::make_shared<Nested>(SmoothBranch(2))),
      torch::nn::AnyModule(std::make_shared<Nested>(SmoothBranch(2)))));
  sequence->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 3, 3});
  const auto step = [&](bool plain) {
    const torch::Tensor loss = sequence(x * 1).square().sum();
    const memcnn::PlainAutogradGuard guard(plain);
    return torch::autograd::grad({loss}, {x})[0];
  };
  const torch::Tensor expected = step(false);
  EXPECT_TRUE(step(true).equal(expected));
}

TEST(PlainAutogradGuardAndOptions, KeepTheNetworkAsItIs) {
  torch::manual_seed(1);
  const auto exact = memcnn::CouplingOptions().fractional_bits(12);
  memcnn::ReversibleSequence sequence(
      Additive(SmoothBranch(2), SmoothBranch(2), exact),
      memcnn::ReversibleSequenceOptions()
          .memory_format(torch::MemoryFormat::ChannelsLast)
          .memory_budget(1 << 20));
  const torch::Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
  const torch::Tensor saving = sequence(x * 1);
  const memcnn::PlainAutogradGuard guard;
  EXPECT_TRUE(sequence(x * 1).equal(saving));
}

} // namespace
} // namespace memcnn_test
