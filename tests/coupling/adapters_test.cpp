// SPDX-License-Identifier: MIT

#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/coupling/affine.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

using torch::indexing::None;
using torch::indexing::Slice;

class AffineAdapterSigmoid : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

class AffineAdapterNaive : public AffineAdapterSigmoid {};

TEST_F(AffineAdapterSigmoid, ScaleComesFromOddChannelsShiftFromEvenOnes) {
  WideBranch f(2);
  memcnn::AffineAdapterSigmoid adapter(f);
  const torch::Tensor x = torch::randn({3, 2, 4, 4});
  const torch::Tensor h = f(x);
  const memcnn::ScaleShift found = adapter(x);
  const auto channels = [&](int64_t start) {
    return h.index({Slice(), Slice(start, None, 2)});
  };
  EXPECT_TRUE(found.scale.equal(torch::sigmoid(channels(1) + 2)));
  EXPECT_TRUE(found.shift.equal(channels(0)));
}

TEST_F(AffineAdapterSigmoid, ValuesByHand) {
  torch::nn::AnyModule identity{torch::nn::Identity()};
  memcnn::AffineAdapterSigmoid adapter(identity);
  const auto found = adapter(torch::tensor({{5., -2., 6., 0.}}));
  EXPECT_TRUE(found.shift.equal(torch::tensor({{5., 6.}})));
  // sigmoid(0) and sigmoid(2) = 1 / (1 + e^-2)
  EXPECT_LT(
      relative_error(found.scale, torch::tensor({{0.5, 0.8807970779778823}})),
      kRoundTripFloat32);
}

TEST_F(AffineAdapterSigmoid, TakesTheSplitDimApart) {
  for (const int64_t dim : {2, -1}) {
    memcnn::AffineAdapterSigmoid adapter(
        LinearBranch(3, 8), memcnn::CouplingOptions().split_dim(dim));
    const torch::Tensor x = torch::randn({2, 6, 3});
    const torch::Tensor h = adapter->f->forward(x);
    const auto found = adapter(x);
    EXPECT_EQ(found.scale.sizes(), (std::vector<int64_t>{2, 6, 4}));
    EXPECT_TRUE(found.shift.equal(h.index({"...", Slice(0, None, 2)})));
    EXPECT_TRUE(found.scale.equal(
        torch::sigmoid(h.index({"...", Slice(1, None, 2)}) + 2)));
  }
}

TEST_F(AffineAdapterSigmoid, TakesTheSplitDimOfItsCoupling) {
  const auto last = memcnn::CouplingOptions().split_dim(2);
  LinearBranch f(3, 6);
  LinearBranch g(3, 6);
  memcnn::AffineCoupling told(
      memcnn::AffineAdapterSigmoid(f, last),
      memcnn::AffineAdapterSigmoid(g, last),
      last);
  memcnn::AffineAdapterSigmoid open_f(f);
  memcnn::AffineAdapterSigmoid open_g(g);
  memcnn::AffineCoupling untold(
      torch::nn::Sequential(torch::nn::Identity(), open_f),
      torch::nn::AnyModule(open_g),
      last);
  EXPECT_EQ(open_f->split_dim(), 2);
  EXPECT_EQ(open_g->split_dim(), 2);
  const torch::Tensor x = torch::randn({2, 4, 6});
  EXPECT_TRUE(untold(x).equal(told(x)));
}

TEST_F(AffineAdapterSigmoid, CopyTakesAnotherSplitDim) {
  memcnn::AffineAdapterSigmoid adapter(LinearBranch(3, 6));
  const auto clone = [&] {
    return decltype(adapter)(
        std::dynamic_pointer_cast<decltype(adapter)::Impl>(adapter->clone()));
  };
  auto before = clone();
  memcnn::AffineCoupling coupling(
      adapter, memcnn::CouplingOptions().split_dim(2));
  auto after = clone();
  const auto along_3 = memcnn::CouplingOptions().split_dim(3);
  EXPECT_NO_THROW(memcnn::AffineCoupling(before, along_3));
  EXPECT_THROW(memcnn::AffineCoupling(after, along_3), c10::ValueError);
}

TEST_F(AffineAdapterSigmoid, CountsTheSplitDimFromEitherEnd) {
  for (const auto& [own, coupling_dim] : {std::pair{-1, 2}, {2, -1}}) {
    memcnn::AffineCoupling coupling(
        memcnn::AffineAdapterSigmoid(
            LinearBranch(3, 6), memcnn::CouplingOptions().split_dim(own)),
        memcnn::CouplingOptions().split_dim(coupling_dim));
    const torch::Tensor x = torch::randn({2, 4, 6});
    EXPECT_LT(
        relative_error(coupling->inverse(coupling(x)), x), kRoundTripFloat32);
    EXPECT_THAT(
        [&coupling = coupling] {
          coupling(torch::randn({1, 2, 6, 6}));
        },
        ThrowsError<c10::ValueError>(
            HasSubstr("AffineAdapterSigmoid::forward(): expected split_dim"),
            HasSubstr("but got an input of sizes [1, 2, "),
            HasSubstr("Leave the adapter's CouplingOptions out")));
  }
}

TEST_F(AffineAdapterSigmoid, ServesTwoCouplingsOfOneSplitDimOnly) {
  memcnn::AffineAdapterSigmoid adapter(LinearBranch(3, 6));
  const auto couple = [&](int64_t dim) {
    memcnn::AffineCoupling coupling(
        adapter, adapter, memcnn::CouplingOptions().split_dim(dim));
  };
  couple(2);
  EXPECT_NO_THROW(couple(2));
  EXPECT_NO_THROW(couple(-1));
  EXPECT_THROW(couple(-2), c10::ValueError) << "-1 was said before";
  EXPECT_THAT(
      [&] { couple(1); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected the adapter F to have the coupling's split_dim, "
                    "but got 2 (coupling 1)")));
}

TEST_F(AffineAdapterSigmoid, RejectsAnOddNumberOfChannels) {
  memcnn::AffineAdapterSigmoid adapter(SmoothBranch(2, 3));
  const auto call = [&] {
    adapter(torch::ones({2, 2, 4, 4}));
  };
  EXPECT_THAT(
      call,
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineAdapterSigmoid::forward(): expected f to return an "
                    "even size in dim 1"),
          HasSubstr("but got sizes [2, 3, 4, 4], Float, cpu"),
          HasSubstr("input sizes [2, 2, 4, 4]"),
          HasSubstr("twice as many channels")));
}

TEST_F(AffineAdapterSigmoid, RejectsAnotherNumberOfDimensions) {
  torch::nn::Sequential flattens{torch::nn::Flatten()};
  memcnn::AffineAdapterSigmoid adapter(flattens);
  EXPECT_THROW(adapter(torch::ones({2, 2, 4})), c10::ValueError);
}

TEST_F(AffineAdapterSigmoid, PrintsItsOptions) {
  std::ostringstream stream;
  stream << memcnn::AffineAdapterSigmoid(
      WideBranch(2), memcnn::CouplingOptions().split_dim(2));
  EXPECT_THAT(
      stream.str(),
      AllOf(
          HasSubstr("memcnn::AffineAdapterSigmoid(split_dim=2)"),
          HasSubstr("(f): ")));
}

TEST_F(AffineAdapterSigmoid, CloneIsDeep) {
  memcnn::AffineAdapterSigmoid adapter(
      WideBranch(2), memcnn::CouplingOptions().split_dim(2));
  adapter->f->eval();
  const auto copy =
      std::dynamic_pointer_cast<decltype(adapter)::Impl>(adapter->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(copy->split_dim(), 2);
  EXPECT_TRUE(copy->is_training());
  EXPECT_FALSE(copy->f->is_training());
  EXPECT_NE(copy->f.ptr(), adapter->f.ptr());
  EXPECT_TRUE(all_equal(copy->parameters(), adapter->parameters()));
  EXPECT_FALSE(copy->parameters()[0].is_same(adapter->parameters()[0]));
}

TEST_F(AffineAdapterSigmoid, TakesTheLogarithmWhereThatIsAskedFor) {
  memcnn::AffineAdapterSigmoid adapter(WideBranch(2));
  const torch::Tensor x = torch::randn({3, 2, 4, 4});
  EXPECT_FALSE(adapter(x).log_scale.defined());
  const memcnn::detail::LogDetAsked asked(true);
  const memcnn::ScaleShift found = adapter(x);
  EXPECT_LT(
      relative_error(found.log_scale, found.scale.log()), kRoundTripFloat32);
}

class AffineAdapterTanh : public AffineAdapterSigmoid {};

TEST_F(AffineAdapterTanh, BoundsTheLogarithmOfTheScale) {
  WideBranch f(2);
  memcnn::AffineAdapterTanh adapter(
      f, memcnn::AffineAdapterTanhOptions().bound(0.5));
  const torch::Tensor x = torch::randn({3, 2, 4, 4});
  const torch::Tensor h = f(x);
  const memcnn::detail::LogDetAsked asked(true);
  const memcnn::ScaleShift found = adapter(x);
  const torch::Tensor expected =
      0.5 * torch::tanh(h.index({Slice(), Slice(1, None, 2)}) / 0.5);
  EXPECT_LT(relative_error(found.log_scale, expected), kRoundTripFloat32);
  EXPECT_LT(relative_error(found.scale, expected.exp()), kRoundTripFloat32);
  EXPECT_TRUE(found.shift.equal(h.index({Slice(), Slice(0, None, 2)})));
  {
    const torch::NoGradGuard no_grad;
    f->conv->weight.mul_(1e6);
    f->conv->bias.add_(1e6);
  }
  EXPECT_LE(adapter(1e6 * x).log_scale.abs().max().item<double>(), 0.5);
}

TEST_F(AffineAdapterTanh, HasItsOptions) {
  memcnn::AffineAdapterTanh adapter(
      WideBranch(2),
      memcnn::AffineAdapterTanhOptions().bound(1.5).split_dim(2));
  EXPECT_EQ(adapter->split_dim(), 2);
  std::ostringstream stream;
  stream << *std::dynamic_pointer_cast<decltype(adapter)::Impl>(
      adapter->clone());
  EXPECT_THAT(
      stream.str(),
      HasSubstr("memcnn::AffineAdapterTanh(split_dim=2, bound=1.5)"));
  for (const double bound : {0.0, -1.0, std::nan("")}) {
    EXPECT_THAT(
        [&] {
          memcnn::AffineAdapterTanh(
              WideBranch(2), memcnn::AffineAdapterTanhOptions().bound(bound));
        },
        ThrowsError<c10::ValueError>(
            HasSubstr("AffineAdapterTanh::AffineAdapterTanh(): expected a "
                      "bound above 0")));
  }
}

TEST_F(AffineAdapterNaive, ShiftIsFAndScaleItsExponential) {
  SmoothBranch f(2);
  memcnn::AffineAdapterNaive adapter(f);
  const torch::Tensor x = torch::randn({3, 2, 4, 4});
  const memcnn::ScaleShift found = adapter(x);
  EXPECT_TRUE(found.shift.equal(f(x)));
  EXPECT_TRUE(found.scale.equal(torch::exp(f(x))));
}

TEST_F(AffineAdapterNaive, PrintsItsOptions) {
  std::ostringstream stream;
  stream << memcnn::AffineAdapterNaive(SmoothBranch(2));
  EXPECT_THAT(
      stream.str(),
      AllOf(
          HasSubstr("memcnn::AffineAdapterNaive(split_dim=1)"),
          HasSubstr("(f): ")));
}

TEST_F(AffineAdapterNaive, KeysAreThoseOfMemCNN) {
  memcnn::AffineAdapterNaive adapter(SmoothBranch(2));
  EXPECT_EQ(
      adapter->named_parameters().keys(),
      (std::vector<std::string>{"f.conv.weight", "f.conv.bias"}));
}

} // namespace
} // namespace memcnn_test
