// SPDX-License-Identifier: MIT

#include "support/autocast.h"
#include "support/flow_modules.h"
#include "support/modules.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <memory>
#include <vector>

namespace memcnn_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using torch::Tensor;

auto conditional_coupling() {
  return memcnn::AdditiveCoupling(ConditionalBranch(2, 2, 2), SmoothBranch(2));
}

TEST(Given, BindsConditionsOfACouplingByItself) {
  torch::manual_seed(1);
  auto coupling = conditional_coupling();
  const Tensor x = torch::randn({2, 4, 3, 3});
  const Tensor c = torch::randn({2, 2, 3, 3});
  const auto given = coupling->given({c});
  const Tensor y = given.forward(x);
  EXPECT_LT(relative_error(given.inverse(y), x), kRoundTripFloat32);
  EXPECT_GT(relative_error(coupling->given({c + 1}).forward(x), y), 1e-3);
  EXPECT_TRUE(given.forward_with_log_det(x).log_det.equal(torch::zeros({2})));
}

TEST(Given, KeepsTheModuleAlive) {
  torch::manual_seed(1);
  const Tensor x = torch::randn({2, 4, 3, 3});
  auto coupling = std::make_unique<decltype(conditional_coupling())>(
      conditional_coupling());
  const auto given = (*coupling)->given({torch::randn({2, 2, 3, 3})});
  const Tensor expected = given.forward(x);
  coupling.reset();
  EXPECT_TRUE(given.forward(x).equal(expected));
}

TEST(Given, EachBranchTakesTheFirstOnes) {
  torch::manual_seed(1);
  memcnn::AdditiveCoupling<torch::nn::AnyModule, ConditionalBranch> coupling(
      torch::nn::AnyModule(ConditionalBranch(2, 2, 2)),
      ConditionalBranch(2, 2, 2));
  const Tensor x = torch::randn({2, 4, 3, 3});
  const Tensor c = torch::randn({2, 2, 3, 3});
  const auto given = coupling->given({c});
  EXPECT_LT(
      relative_error(given.inverse(given.forward(x)), x), kRoundTripFloat32);
}

TEST(Given, SaysHowManyAreWrong) {
  torch::manual_seed(1);
  memcnn::ReversibleSequence flow(
      memcnn::AdditiveCoupling(SmoothBranch(2)), conditional_coupling());
  const Tensor x = torch::randn({2, 4, 3, 3});
  const Tensor c = torch::randn({2, 2, 3, 3});
  EXPECT_THAT(
      [&] { flow->forward(x); },
      ThrowsError<c10::ValueError>(AllOf(
          HasSubstr("block 1 (AdditiveCoupling)"),
          HasSubstr("expected at least 1 conditions for this block, but got "
                    "0"))));
  EXPECT_THAT(
      [&] {
        flow->given({c, c}).inverse(x);
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "ReversibleSequence::inverse(): expected 1 conditions for all "
          "blocks, but got 2")));
  EXPECT_THAT(
      [&] {
        conditional_coupling()->given({c, c}).forward(x);
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "AdditiveCoupling::forward(): expected 1 conditions, but got 2")));
  EXPECT_THAT(
      [&] { flow->given({Tensor()}).forward(x); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "expected tensors as conditions, but got an undefined one")));
  EXPECT_THAT(
      [&] {
        flow->given({torch::randn({2, 2, 4, 3})}).forward(x);
      },
      ThrowsError<c10::Error>(AllOf(
          HasSubstr("block 1 (AdditiveCoupling)"),
          HasSubstr("F of AdditiveCoupling::forward()"))));
}

TEST(Given, OfAnAnyModuleIsToldByPushBack) {
  torch::manual_seed(1);
  memcnn::AdditiveCoupling coupling(
      torch::nn::AnyModule(ConditionalBranch(2, 3, 2)),
      torch::nn::AnyModule(ConditionalBranch(2, 3, 2)));
  memcnn::ReversibleSequence flow;
  flow->push_back("first", coupling, {1});
  flow->push_back(conditional_coupling());
  const Tensor x = torch::randn({2, 4, 3, 3}).requires_grad_();
  const Tensor c = torch::randn({2, 2, 3, 3});
  const Tensor c2 = torch::randn({2, 3, 3, 3});
  const Tensor y = flow->given({c, c2}).forward(x);
  EXPECT_LT(
      relative_error(flow->given({c, c2}).inverse(y), x), kRoundTripFloat32);
  memcnn::ReversibleSequence without;
  without->push_back(coupling);
  EXPECT_THAT(
      [&] { without->forward(x); },
      ThrowsError<c10::Error>(HasSubstr("block 0 (AdditiveCoupling)")));

  // What a block gets is copied with it.
  auto copy =
      std::dynamic_pointer_cast<memcnn::ReversibleSequenceImpl>(flow->clone());
  EXPECT_TRUE(copy->given({c, c2}).forward(x).equal(y));
  memcnn::ReversibleSequence extended;
  extended->extend(*flow);
  EXPECT_TRUE(extended->given({c, c2}).forward(x).equal(y));
}

TEST(Given, ChangedConditionsStopBackward) {
  torch::manual_seed(1);
  for (const bool wrapped : {false, true}) {
    memcnn::ReversibleSequence flow{conditional_coupling()};
    memcnn::InvertibleModuleWrapper wrapper{conditional_coupling()};
    Tensor c = torch::randn({2, 2, 3, 3});
    const Tensor x = torch::randn({2, 4, 3, 3}).requires_grad_();
    const Tensor y = wrapped ? wrapper->given({c}).forward(x * 1)
                             : flow->given({c}).forward(x);
    c.add_(1);
    EXPECT_THAT(
        [&] { y.sum().backward(); },
        ThrowsError<c10::Error>(AllOf(
            HasSubstr("expected the conditions that it was given to be "
                      "unchanged until backward"),
            HasSubstr("[2, 2, 3, 3]"))));
  }
}

/// Embeds integers, where a mask says so.
struct TokenBranchImpl final : torch::nn::Cloneable<TokenBranchImpl> {
  TokenBranchImpl() {
    reset();
  }
  void reset() override {
    embedding = register_module("embedding", torch::nn::Embedding(5, 4));
    linear = register_module("linear", torch::nn::Linear(4, 4));
  }
  Tensor forward(const Tensor& x, const Tensor& tokens, const Tensor& mask) {
    return torch::tanh(linear(x) + embedding(tokens))
        .masked_fill(mask.unsqueeze(-1), 0);
  }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(TokenBranch);

TEST(Given, TakesIntegersAndMasks) {
  torch::manual_seed(1);
  memcnn::ReversibleSequence flow;
  for (int i = 0; i < 3; ++i) {
    flow->push_back(memcnn::AdditiveCoupling(
        TokenBranch(), memcnn::CouplingOptions().split_dim(2)));
  }
  flow->to(torch::kDouble);
  const Tensor x = leaf({2, 6, 8});
  const std::vector<Tensor> given = {
      torch::randint(5, {2, 6}), torch::rand({2, 6}) < 0.3};
  const auto gradients = [&](bool plain, int64_t budget) {
    flow->options.disable(plain).memory_budget(budget);
    std::vector<Tensor> leaves = flow->parameters();
    leaves.push_back(x);
    return torch::autograd::grad(
        {flow->given(given).forward(x).square().sum()}, leaves);
  };
  EXPECT_LT(
      relative_error(gradients(false, 0), gradients(true, 0)),
      kGradientFloat64);
  EXPECT_LT(
      relative_error(gradients(false, 1 << 20), gradients(true, 0)),
      kGradientFloat64);
}

TEST(Given, OneModuleMayTakeAConditionItself) {
  torch::manual_seed(1);
  memcnn::InvertibleModuleWrapper wrapped{ConditionalScale()};
  const Tensor x = leaf({2, 3, 2, 2});
  const Tensor c = leaf({2, 1, 2, 2});
  const auto gradients = [&](int way) {
    const Tensor in = made_by_a_layer(x);
    const Tensor y = way == 0 ? wrapped->module->forward(in, 2 * c)
        : way == 1            ? wrapped->forward(in, 2 * c)
                              : wrapped->given({2 * c}).forward(in);
    return torch::autograd::grad({y.square().sum()}, {x, c});
  };
  EXPECT_LT(relative_error(gradients(1), gradients(0)), kGradientFloat64);
  EXPECT_LT(relative_error(gradients(2), gradients(0)), kGradientFloat64);

  const Tensor h = made_by_a_layer(x);
  const Tensor condition = 2 * c;
  const Tensor y = wrapped->forward(h, condition);
  EXPECT_EQ(wrapped->input_kept_because(), "");
  EXPECT_NO_THROW(condition.sum().item<double>()) << "a condition was freed";
  EXPECT_LT(
      relative_error(wrapped->inverse(y, condition), x), kRoundTripFloat64);
}

TEST(Given, AConditionMayBeTheInput) {
  torch::manual_seed(1);
  memcnn::InvertibleModuleWrapper wrapped{ConditionalScale()};
  const Tensor x = leaf({2, 3, 2, 2});
  const auto gradient = [&](bool plain) {
    wrapped->options.disable(plain);
    const Tensor h = made_by_a_layer(x);
    return torch::autograd::grad({wrapped->forward(h, h).square().sum()}, {x});
  };
  EXPECT_LT(relative_error(gradient(false), gradient(true)), kGradientFloat64);
}

TEST(Given, WorksUnderAutocast) {
  torch::manual_seed(1);
  memcnn::ReversibleSequence flow;
  for (int i = 0; i < 3; ++i) {
    flow->push_back(memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid{ConditionalBranch(2, 2, 4)}));
  }
  const Tensor x = leaf({2, 4, 3, 3}, torch::kFloat);
  const Tensor c = leaf({2, 2, 3, 3}, torch::kFloat);
  const auto gradients = [&](bool plain) {
    flow->options.disable(plain);
    memcnn::WithLogDet result;
    {
      const Autocast autocast(torch::kCPU, torch::kBFloat16);
      result = flow->given({c}).forward_with_log_det(x);
    }
    EXPECT_EQ(result.output.scalar_type(), torch::kFloat);
    EXPECT_EQ(result.log_det.scalar_type(), torch::kFloat);
    std::vector<Tensor> leaves = flow->parameters();
    leaves.insert(leaves.end(), {x, c});
    return torch::autograd::grad(
        {result.output.square().sum() + result.log_det.sum()}, leaves);
  };
  EXPECT_LT(
      relative_error(gradients(false), gradients(true)), kGradientAutocast);
}

TEST(Given, AWrapperIsABlockLikeAnother) {
  torch::manual_seed(1);
  const Tensor x = torch::randn({2, 4, 3, 3});
  memcnn::ReversibleSequence known{
      memcnn::InvertibleModuleWrapper{Scaled(4)},
      memcnn::InvertibleModuleWrapper{Flipped()}};
  EXPECT_LT(
      relative_error(
          known->forward_with_log_det(x).log_det,
          Scaled(4)->forward_with_log_det(x).log_det.expand(2)),
      kRoundTripFloat32);
  memcnn::ReversibleSequence unknown{memcnn::InvertibleModuleWrapper{Silent()}};
  EXPECT_THAT(
      [&] { unknown->forward_with_log_det(x); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected a module with a log-determinant")));
}

TEST(Given, AWrapperPassesConditionsAndBranchesOn) {
  // Dropout: the branches of what it wraps draw again, each its own numbers.
  torch::manual_seed(2);
  const auto coupling = [] {
    return memcnn::AdditiveCoupling(torch::nn::Sequential(
        torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 1)),
        torch::nn::Dropout(0.5)));
  };
  memcnn::ReversibleSequence inner(coupling(), coupling());
  inner->push_back(memcnn::AdditiveCoupling(ConditionalBranch(2, 2, 2)));
  memcnn::ReversibleSequence flow{memcnn::InvertibleModuleWrapper(inner)};
  flow->to(torch::kDouble);
  const Tensor x = leaf({2, 4, 3, 3});
  const Tensor c = leaf({2, 2, 3, 3});
  const auto gradients = [&] {
    torch::manual_seed(3);
    std::vector<Tensor> of = flow->parameters();
    of.insert(of.end(), {x, c});
    return torch::autograd::grad(
        {flow->given({c}).forward(x).square().sum()}, of);
  };
  const auto found = gradients();
  const memcnn::PlainAutogradGuard plain;
  EXPECT_LT(relative_error(found, gradients()), kGradientFloat64);
}

TEST(Given, NeedsAMapOfOneTensor) {
  struct PairImpl final : torch::nn::Cloneable<PairImpl> {
    void reset() override {}
    std::tuple<Tensor, Tensor> forward(Tensor a, Tensor b) {
      return {b, a};
    }
    std::tuple<Tensor, Tensor> inverse(Tensor a, Tensor b) {
      return {b, a};
    }
  };
  memcnn::InvertibleModuleWrapper wrapped(
      torch::nn::ModuleHolder<PairImpl>(std::make_shared<PairImpl>()));
  EXPECT_TRUE(memcnn::is_invertible_module(wrapped, {{2, 2}, {2, 2}}));
  EXPECT_THAT(
      [&] {
        wrapped->forward_with_log_det(torch::zeros({2, 2}));
      },
      ThrowsError<c10::Error>(HasSubstr(
          "InvertibleModuleWrapper::forward(): expected a module that maps one "
          "tensor to one")));
}

} // namespace
} // namespace memcnn_test
