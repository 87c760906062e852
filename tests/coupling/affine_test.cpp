// SPDX-License-Identifier: MIT

#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/coupling/affine.h>
#include <memcnn/wrapper.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace memcnn_test {

using testing::HasSubstr;

struct AffineNaive {
  static constexpr const char* kName = "Naive";
  static constexpr const char* kReference = "affine_naive";
  static auto make() {
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterNaive(ConvBranch(2)),
        memcnn::AffineAdapterNaive(ConvBranch(2)));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AffineCoupling(split_dim=1)";
  }
};

struct AffineSigmoid {
  static constexpr const char* kName = "Sigmoid";
  static constexpr const char* kReference = "affine_sigmoid";
  static auto make() {
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(2)),
        memcnn::AffineAdapterSigmoid(WideBranch(2)));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AffineCoupling(split_dim=1)";
  }
};

/// Five channels: F maps two of them to scale and shift of three.
struct AffineUnequal {
  static constexpr const char* kName = "UnequalHalves";
  static auto make() {
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(2, 3)),
        memcnn::AffineAdapterSigmoid(WideBranch(3, 2)));
  }
  static std::vector<int64_t> shape() {
    return {2, 5, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AffineCoupling(split_dim=1)";
  }
};

struct AffineLastDim {
  static constexpr const char* kName = "LastDim";
  static auto make() {
    const auto options = memcnn::CouplingOptions().split_dim(-1);
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(LinearBranch(3, 6), options),
        memcnn::AffineAdapterSigmoid(LinearBranch(3, 6), options),
        options);
  }
  static std::vector<int64_t> shape() {
    return {2, 3, 6};
  }
  static std::string printed() {
    return "memcnn::AffineCoupling(split_dim=-1)";
  }
};

/// A branch of the user's own that returns a ScaleShift.
struct OwnScaleShiftImpl final : torch::nn::Cloneable<OwnScaleShiftImpl> {
  OwnScaleShiftImpl() {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 2, 3).padding(1)));
  }
  memcnn::ScaleShift forward(torch::Tensor x) {
    const torch::Tensor h = torch::tanh(conv(x));
    return {1.5 + 0.5 * h, h.sin()};
  }
  torch::nn::Conv2d conv{nullptr};
};
TORCH_MODULE(OwnScaleShift);

/// Once by itself, once as AnyModule.
struct AffineOwnBranches {
  static constexpr const char* kName = "OwnBranchAndAnyModule";
  static auto make() {
    return memcnn::AffineCoupling(
        OwnScaleShift(), torch::nn::AnyModule(OwnScaleShift()));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AffineCoupling(split_dim=1)";
  }
};

/// Of a Glow: half 0 alone changes.
struct AffineOneSided {
  static constexpr const char* kName = "OneSided";
  static auto make() {
    return memcnn::AffineCoupling(
        memcnn::AffineAdapterTanh(WideBranch(2)), memcnn::Unchanged());
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::AffineAdapterTanh(split_dim=1, bound=2)";
  }
};

/// Half 1 alone, of an odd number of channels.
struct AffineOtherSide {
  static constexpr const char* kName = "OtherSide";
  static auto make() {
    return memcnn::AffineCoupling(
        memcnn::Unchanged(), memcnn::AffineAdapterSigmoid(WideBranch(3, 2)));
  }
  static std::vector<int64_t> shape() {
    return {2, 5, 3, 3};
  }
  static std::string printed() {
    return "(Fm): memcnn::Unchanged()";
  }
};

MEMCNN_INVERTIBLE_SUITE(
    AffineCoupling,
    AffineNaive,
    AffineSigmoid,
    AffineUnequal,
    AffineLastDim,
    AffineOwnBranches,
    AffineOneSided,
    AffineOtherSide);
MEMCNN_REFERENCE_SUITE(AffineCoupling, AffineNaive, AffineSigmoid);

namespace {

/// scale = a x, shift = b x.
struct MultiplesImpl final : torch::nn::Cloneable<MultiplesImpl> {
  MultiplesImpl(double a_, double b_) : a(a_), b(b_) {}
  void reset() override {}
  memcnn::ScaleShift forward(torch::Tensor x) {
    return {a * x, b * x};
  }
  double a;
  double b;
};
TORCH_MODULE(Multiples);

class AffineCoupling : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

TEST_F(AffineCoupling, ForwardAndInverseFollowTheFormula) {
  memcnn::AffineCoupling coupling(Multiples(2, 10), Multiples(0.5, 100));
  const torch::Tensor x = torch::tensor({{1., 2.}, {3., 4.}});
  // y1 = 2 x2 x1 + 10 x2, y2 = 0.5 y1 x2 + 100 y1
  const torch::Tensor y = torch::tensor({{24., 2424.}, {64., 6528.}});
  EXPECT_TRUE(coupling(x).equal(y));
  EXPECT_TRUE(coupling->inverse(y).equal(x));
}

/// scale = s, shift = t.
struct ConstantsImpl final : torch::nn::Cloneable<ConstantsImpl> {
  ConstantsImpl(double s_, double t_) : s(s_), t(t_) {}
  void reset() override {}
  memcnn::ScaleShift forward(torch::Tensor x) {
    return {torch::full_like(x, s), torch::full_like(x, t)};
  }
  double s;
  double t;
};
TORCH_MODULE(Constants);

TEST_F(AffineCoupling, LogDetByHand) {
  memcnn::AffineCoupling coupling(Constants(0.5, 3), Constants(-4, -1));
  const torch::Tensor x = torch::tensor({{1., 2.}});
  const auto [y, log_det] = coupling->forward_with_log_det(x);
  EXPECT_TRUE(y.equal(torch::tensor({{3.5, -9.}})));
  EXPECT_NEAR(log_det.item<double>(), 0.693147, 1e-6); // log(0.5 * |-4|)
  const auto [again, minus] = coupling->inverse_with_log_det(y);
  EXPECT_TRUE(again.equal(x));
  EXPECT_NEAR(minus.item<double>(), -0.693147, 1e-6);
}

/// Returns twice the channels of its input, all of one value.
struct FlatImpl final : torch::nn::Cloneable<FlatImpl> {
  explicit FlatImpl(double value_ = 0) : value(value_) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return 0 * torch::cat({x, x}, 1) + value;
  }
  double value;
};
TORCH_MODULE(Flat);

TEST_F(AffineCoupling, LogDetOfSigmoidsOverZeros) {
  const torch::Tensor x = torch::randn({2, 12, 4, 4});
  memcnn::AffineCoupling both{memcnn::AffineAdapterSigmoid{Flat()}};
  memcnn::AffineCoupling one{
      memcnn::AffineAdapterSigmoid{Flat()}, memcnn::Unchanged()};
  for (int64_t n = 0; n < 2; ++n) {
    EXPECT_NEAR(
        both->forward_with_log_det(x).log_det[n].item<double>(),
        -24.370178,
        1e-5);
    EXPECT_NEAR(
        one->forward_with_log_det(x).log_det[n].item<double>(),
        -12.185089,
        1e-5);
  }
  EXPECT_TRUE(one->forward(x).narrow(1, 6, 6).equal(x.narrow(1, 6, 6)));
}

/// sigmoid(-110) is 0 in float32: its logarithm has to come from elsewhere.
TEST_F(AffineCoupling, LogDetSurvivesAScaleThatVanishes) {
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    memcnn::AffineCoupling coupling{
        memcnn::AffineAdapterSigmoid{Flat(-112)}, memcnn::Unchanged()};
    torch::Tensor x = torch::ones({1, 2, 1, 1}, dtype).requires_grad_();
    const auto [y, log_det] = coupling->forward_with_log_det(x);
    EXPECT_NEAR(log_det.item<double>(), -110, 0.1);
    EXPECT_EQ(log_det.scalar_type(), torch::kFloat);
    const torch::Tensor gradient =
        torch::autograd::grad({log_det.sum() + y.sum()}, {x})[0];
    EXPECT_TRUE(gradient.isfinite().all().item<bool>());
  }
}

TEST_F(AffineCoupling, SplitsAlongRows) {
  memcnn::AffineCoupling rows(
      Multiples(2, 10),
      Multiples(0.5, 100),
      memcnn::CouplingOptions().split_dim(2));
  memcnn::AffineCoupling channels(Multiples(2, 10), Multiples(0.5, 100));
  const torch::Tensor x = torch::randn({2, 3, 5 + 1, 4}, torch::kDouble);
  EXPECT_TRUE(rows(x).equal(channels(x.transpose(1, 2)).transpose(1, 2)));
}

TEST_F(AffineCoupling, WithoutGCopiesTheAdapterDeeply) {
  memcnn::AffineAdapterSigmoid f(WideBranch(2));
  memcnn::AffineCoupling coupling(f);
  EXPECT_EQ(coupling->f.ptr(), f.ptr());
  EXPECT_NE(coupling->g.ptr(), f.ptr());
  EXPECT_NE(coupling->g->f.ptr(), f->f.ptr());
  EXPECT_TRUE(all_equal(coupling->g->parameters(), f->parameters()));
  EXPECT_EQ(coupling->parameters().size(), 2 * f->parameters().size());
}

TEST_F(AffineCoupling, KeysAreThoseOfMemCNN) {
  auto coupling = AffineSigmoid::make();
  EXPECT_EQ(
      coupling->named_parameters().keys(),
      (std::vector<std::string>{
          "Fm.f.conv.weight",
          "Fm.f.conv.bias",
          "Gm.f.conv.weight",
          "Gm.f.conv.bias"}));
}

// Bad input beyond what additive_test.cpp has for all couplings.

TEST_F(AffineCoupling, RejectsAnAdapterOfAnotherSplitDim) {
  const auto adapter = [](int64_t dim) {
    return memcnn::AffineAdapterSigmoid(
        WideBranch(2), memcnn::CouplingOptions().split_dim(dim));
  };
  const auto options = memcnn::CouplingOptions().split_dim(2);
  const auto make = [&](int64_t of_f, int64_t of_g) {
    memcnn::AffineCoupling coupling(adapter(of_f), adapter(of_g), options);
  };
  EXPECT_NO_THROW(make(2, 2));
  EXPECT_THAT(
      [&] { make(1, 2); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineCoupling::AffineCoupling(): expected the adapter F "
                    "to have the coupling's split_dim, but got 1 (coupling 2). "
                    "Give each coupling an adapter of its own")));
  EXPECT_THAT(
      [&] { make(2, 3); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected the adapter G"), HasSubstr("got 3")));
}

TEST_F(AffineCoupling, InverseRejectsAScaleOfZero) {
  memcnn::AffineCoupling coupling(Multiples(1, 1), Multiples(1, 1));
  const torch::Tensor y = torch::tensor({{0., 1.}, {2., 3.}});
  EXPECT_NO_THROW(coupling(y));
  EXPECT_THAT(
      [&] { coupling->inverse(y); },
      ThrowsError<c10::ValueError>(
          HasSubstr("AffineCoupling::inverse(): expected a scale without "
                    "zeros, but got one with 1"),
          HasSubstr("AffineAdapterSigmoid")));
}

TEST_F(AffineCoupling, BackwardOverAScaleOfZeroIsAnError) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AffineCoupling(Multiples(1, 1), Multiples(1, 1)));
  const torch::Tensor x = torch::tensor({{1., 0.}, {2., 3.}}).requires_grad_();
  const torch::Tensor y = block(made_by_a_layer(x)).sum();
  EXPECT_THAT(
      [&] { y.backward(); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected a scale without zeros")));
}

TEST_F(AffineCoupling, RejectsAScaleOfOtherSizes) {
  // The adapter takes apart what f returns: here one channel each.
  memcnn::AffineCoupling coupling(
      memcnn::AffineAdapterSigmoid(WideBranch(2, 1)),
      memcnn::AffineAdapterSigmoid(WideBranch(2, 2)));
  const auto call = [&] {
    coupling(torch::ones({2, 4, 3, 3}));
  };
  EXPECT_THAT(
      call,
      ThrowsError<c10::ValueError>(HasSubstr(
          "AffineCoupling::forward(): expected F to return the sizes [2, 2, 3, "
          "3] of the half that it updates, but got sizes [2, 1, 3, 3]")));
}

} // namespace
} // namespace memcnn_test
