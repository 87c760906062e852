// SPDX-License-Identifier: MIT

#include "../support/autocast.h"
#include "../support/flow_layer_checks.h"
#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace memcnn_test {

using memcnn::Parametrization;
using testing::HasSubstr;
using torch::Tensor;

memcnn::Conv1x1 made_conv1x1(int64_t channels, Parametrization kind) {
  return memcnn::Conv1x1(
      channels, memcnn::Conv1x1Options().parametrization(kind));
}

template <Parametrization kKind>
struct Conv1x1Images {
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return made_conv1x1(4, kKind);
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
};
struct Conv1x1Plain : Conv1x1Images<memcnn::kPlain> {
  static constexpr const char* kName = "Plain";
  static std::string printed() {
    return "memcnn::Conv1x1(4, parametrization=kPlain)";
  }
};
struct Conv1x1LU : Conv1x1Images<memcnn::kLU> {
  static constexpr const char* kName = "LU";
  static std::string printed() {
    return "memcnn::Conv1x1(4, parametrization=kLU)";
  }
};
struct Conv1x1Orthogonal : Conv1x1Images<memcnn::kOrthogonal> {
  static constexpr const char* kName = "Orthogonal";
  /// Not at the start, where `skew` is zero in every one.
  static auto make() {
    auto layer = Conv1x1Images<memcnn::kOrthogonal>::make();
    const torch::NoGradGuard no_grad;
    layer->parameters()[0].normal_();
    return layer;
  }
  static std::string printed() {
    return "memcnn::Conv1x1(4, parametrization=kOrthogonal)";
  }
};

MEMCNN_INVERTIBLE_SUITE(Conv1x1, Conv1x1Plain, Conv1x1LU, Conv1x1Orthogonal);

namespace {

class Conv1x1 : public testing::TestWithParam<Parametrization> {
 protected:
  void SetUp() override {
    torch::manual_seed(3);
  }

  memcnn::Conv1x1 make(int64_t channels) const {
    return made_conv1x1(channels, GetParam());
  }
};
using Conv1x1Values = Conv1x1; // of some parametrizations only

std::string name_of_kind(const testing::TestParamInfo<Parametrization>& info) {
  constexpr const char* kNames[] = {"Plain", "LU", "Orthogonal"};
  return kNames[static_cast<size_t>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(
    All,
    Conv1x1,
    testing::Values(memcnn::kPlain, memcnn::kLU, memcnn::kOrthogonal),
    name_of_kind);

/// |W W^T - I|, the largest entry.
double distance_from_orthogonal(const Tensor& weight) {
  const Tensor wide = weight.detach().to(torch::kDouble);
  return (wide.matmul(wide.t()) - torch::eye(wide.size(0), torch::kDouble))
      .abs()
      .max()
      .item<double>();
}

Tensor matrix(const std::vector<double>& entries) {
  return torch::tensor(entries).view({2, 2});
}

TEST_P(Conv1x1, BeginsAsARandomRotation) {
  for (const int64_t channels : {1, 2, 12, 48}) {
    memcnn::Conv1x1 layer = make(channels);
    const Tensor log_det =
        layer->forward_with_log_det(torch::randn({2, channels, 4, 4})).log_det;
    EXPECT_LT(log_det.abs().max().item<double>(), 1e-5 * 16);
    EXPECT_LT(distance_from_orthogonal(layer->weight()), 1e-6);
    EXPECT_GT(torch::det(layer->weight()).item<double>(), 0);
  }
  EXPECT_FALSE(make(4)->weight().equal(make(4)->weight()));
}

TEST_P(Conv1x1, HalvesEqualWhole) {
  memcnn::Conv1x1 layer = moved(make(6));
  for (const Tensor& x : streams_of(6)) {
    halves_equal_whole(*layer, x);
  }
}

TEST_P(Conv1x1, GradientsMatchPlainAutogradForEveryStream) {
  memcnn::Conv1x1 layer = moved(make(6));
  for (const Tensor& x : streams_of(6)) {
    gradients_match_plain_autograd(layer, x);
  }
}

TEST_P(Conv1x1, LogDetMatchesJacobianForEveryStream) {
  memcnn::Conv1x1 layer = moved(make(3));
  for (const Tensor& x : streams_of(3)) {
    log_det_matches_jacobian(layer, x);
  }
}

TEST_P(Conv1x1, KeepsTheLayoutOfTheStream) {
  const torch::NoGradGuard no_grad;
  memcnn::Conv1x1 layer = moved(make(6));
  for (const Tensor& x : streams_of(6)) {
    EXPECT_EQ(layer(x).strides(), x.strides());
    // Memory of its own, which the next block may overwrite.
    EXPECT_TRUE(memcnn::detail::is_sole_owner(layer(x)));
  }
}

TEST_P(Conv1x1, IsAConvolution) {
  memcnn::Conv1x1 layer = make(6);
  const Tensor x = torch::randn({2, 6, 3, 4});
  EXPECT_LT(
      relative_error(
          layer(x),
          torch::conv2d(x, layer->weight().unsqueeze(-1).unsqueeze(-1))),
      1e-6);
}

TEST_P(Conv1x1, ComputesInTheStreamsDtypeUnderAutocast) {
  memcnn::Conv1x1 layer = make(6);
  const Tensor x = torch::randn({2, 6, 3, 4});
  const auto expected = layer->forward_with_log_det(x);
  const Autocast autocast(torch::kCPU, torch::kBFloat16);
  const auto found = layer->forward_with_log_det(x);
  EXPECT_TRUE(found.output.equal(expected.output));
  EXPECT_TRUE(found.log_det.equal(expected.log_det));
  EXPECT_LT(relative_error(layer->inverse(found.output), x), kRoundTripFloat32);
}

TEST_P(Conv1x1, TakesStreamsNarrowerThanItsParameters) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    memcnn::ReversibleSequence flow(make(4));
    const Tensor x = torch::randn({2, 4, 3}).to(dtype).requires_grad_();
    const auto [y, log_det] = flow->forward_with_log_det(x);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_EQ(log_det.scalar_type(), torch::kFloat);
    (y.sum() + log_det.sum()).backward();
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    for (const Tensor& parameter : flow->parameters()) {
      EXPECT_EQ(parameter.grad().scalar_type(), torch::kFloat);
    }
    EXPECT_LT(relative_error(flow->inverse(y), x), round_trip_tolerance(dtype));
  }
}

TEST_P(Conv1x1, StaysExactWhereItsDtypeChanges) {
  memcnn::Conv1x1 layer = make(16);
  for (const auto dtype : {torch::kBFloat16, torch::kFloat, torch::kDouble}) {
    layer->to(dtype);
  }
  const Tensor x = torch::randn({2, 16, 3}, torch::kDouble);
  EXPECT_LT(
      relative_error(layer->inverse(layer(x)), x),
      GetParam() == memcnn::kOrthogonal ? 1e-9 : kRoundTripFloat64);
}

TEST_P(Conv1x1, LearnsNothingThatIsFrozen) {
  memcnn::Conv1x1 layer = moved(make(4));
  for (Tensor& parameter : layer->parameters()) {
    parameter.set_requires_grad(false);
  }
  memcnn::ReversibleSequence flow(layer);
  const Tensor x = leaf({2, 4, 3});
  const auto [y, log_det] = flow->forward_with_log_det(made_by_a_layer(x));
  (y.square().sum() + log_det.sum()).backward();
  for (const Tensor& parameter : layer->parameters()) {
    EXPECT_FALSE(parameter.grad().defined());
  }
  EXPECT_LT(
      relative_error(
          x.grad(), torch::autograd::grad({layer(x).square().sum()}, {x})[0]),
      kGradientFloat64);
}

TEST_P(Conv1x1, AllAgreeOnOneWeight) {
  const Tensor weight = made_conv1x1(6, memcnn::kOrthogonal)->weight().detach();
  memcnn::Conv1x1 plain = made_conv1x1(6, memcnn::kPlain);
  memcnn::Conv1x1 layer = make(6);
  plain->set_weight(weight);
  layer->set_weight(weight);
  EXPECT_LT(relative_error(layer->weight(), weight), 1e-6);
  const Tensor x = torch::randn({2, 6, 3});
  const auto expected = plain->forward_with_log_det(x);
  const auto found = layer->forward_with_log_det(x);
  EXPECT_LT(relative_error(found.output, expected.output), 1e-6);
  EXPECT_LT(
      (found.log_det - expected.log_det).abs().max().item<double>(), 1e-5);
}

TEST_P(Conv1x1, TakesAReflection) {
  memcnn::Conv1x1 layer = make(2);
  layer->set_weight(matrix({0, 1, 1, 0})); // det -1
  const Tensor x = torch::randn({2, 2, 4, 4});
  const auto [y, log_det] = layer->forward_with_log_det(x);
  EXPECT_TRUE(torch::allclose(y, x.flip(1)));
  EXPECT_TRUE(log_det.equal(torch::zeros(2)));
  EXPECT_TRUE(torch::allclose(layer->inverse(y), x));
}

TEST_P(Conv1x1, RejectsAWeightThatDoesNotFit) {
  memcnn::Conv1x1 layer = make(4);
  EXPECT_THAT(
      [&] { layer->set_weight(torch::eye(3)); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Conv1x1::set_weight(): expected a weight of sizes [4, 4], but got "
          "sizes [3, 3], Float, cpu. Give a row for each channel of the result, "
          "a column for each of the input.")));
  EXPECT_THAT(
      [&] { layer->set_weight(Tensor()); },
      ThrowsError<c10::ValueError>(HasSubstr("Conv1x1::set_weight(): ")));
}

TEST_P(Conv1x1, RejectsWhatIsNoStreamOfItsChannels) {
  memcnn::Conv1x1 layer = make(4);
  EXPECT_THAT(
      [&] {
        layer(torch::ones({2, 3, 5}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Conv1x1::forward(): expected an input (N, C, *) with C = 4 channels, "
          "but got 3")));
  EXPECT_THAT(
      [&] { layer->inverse(Tensor()); },
      ThrowsError<c10::ValueError>(HasSubstr("Conv1x1::inverse(): ")));
  EXPECT_THAT(
      [&] { make(0); },
      ThrowsError<c10::ValueError>(
          HasSubstr("Conv1x1::Conv1x1(): expected at least 1 channel")));
}

TEST_P(Conv1x1, RunsInAFlowOfHalves) {
  memcnn::ReversibleSequence flow;
  for (int step = 0; step < 4; ++step) {
    flow->push_back(memcnn::ActNorm(6));
    flow->push_back(make(6));
    flow->push_back(memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(3)), memcnn::Unchanged()));
  }
  flow->to(torch::kDouble);
  const Tensor x = torch::randn({2, 6, 4, 4}, torch::kDouble);
  memcnn::initialize(flow, x);
  const auto gradients = [&] {
    const auto [z, log_det] = flow->forward_with_log_det(x);
    return torch::autograd::grad(
        {(0.5 * z.square().flatten(1).sum(1) - log_det).mean()},
        flow->parameters());
  };
  const auto found = gradients();
  flow->options.disable(true);
  EXPECT_LT(relative_error(found, gradients()), kGradientFloat64);
}

INSTANTIATE_TEST_SUITE_P(
    General,
    Conv1x1Values,
    testing::Values(memcnn::kPlain, memcnn::kLU),
    name_of_kind);

TEST_P(Conv1x1Values, HasKnownValues) {
  memcnn::Conv1x1 layer = make(2);
  layer->set_weight(matrix({0, -2, 1, 0}));
  const Tensor x =
      torch::tensor({1.f, 2.f}).view({1, 2, 1, 1}).expand({1, 2, 4, 4});
  const auto [y, log_det] = layer->forward_with_log_det(x);
  EXPECT_TRUE(torch::allclose(y.select(1, 0), torch::full({1, 4, 4}, -4.f)));
  EXPECT_TRUE(torch::allclose(y.select(1, 1), torch::full({1, 4, 4}, 1.f)));
  EXPECT_NEAR(log_det.item<double>(), 11.090355, 1e-5);
  const auto back = layer->inverse_with_log_det(y);
  EXPECT_TRUE(torch::allclose(back.output, x));
  EXPECT_NEAR(back.log_det.item<double>(), -11.090355, 1e-5);
}

class Conv1x1Weight : public testing::Test {};

TEST_F(Conv1x1Weight, MayBeSingularOnlyWhereItIsPlain) {
  memcnn::Conv1x1 plain = made_conv1x1(2, memcnn::kPlain);
  const Tensor x = torch::randn({1, 2, 3}).requires_grad_();
  for (const Tensor& singular :
       {matrix({1, 2, 2, 4}), matrix({3, 9, 1, 3}), matrix({0, 0, 0, 0})}) {
    plain->set_weight(singular);
    const auto is_named = [](const char* method) {
      return ThrowsError<c10::ValueError>(HasSubstr(
          std::string("Conv1x1::") + method +
          "(): expected an invertible weight, but got a singular one (sizes "
          "[2, 2]). Give it another by set_weight(), or the parametrization "
          "kLU or kOrthogonal, which stay invertible."));
    };
    EXPECT_NO_THROW(plain(x));
    EXPECT_THAT([&] { plain->forward_with_log_det(x); }, is_named("forward"));
    EXPECT_THAT([&] { plain->inverse(x); }, is_named("inverse"));
    memcnn::ReversibleSequence flow(plain);
    EXPECT_THAT(
        [&] { flow->forward(x).sum().backward(); }, is_named("backward"));
    EXPECT_THAT(
        [&] { made_conv1x1(2, memcnn::kLU)->set_weight(singular); },
        is_named("set_weight"));
  }
}

TEST_F(Conv1x1Weight, OfAnOrthogonalOneHasToBeOrthogonal) {
  memcnn::Conv1x1 layer = made_conv1x1(2, memcnn::kOrthogonal);
  EXPECT_THAT(
      [&] {
        layer->set_weight(matrix({0, -2, 1, 0}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Conv1x1::set_weight(): expected an orthogonal weight, W W^T = I "
          "within 0.0001, but got one that is off by 3 (sizes [2, 2]). Use the "
          "parametrization kPlain or kLU for other matrices.")));
  // What is nearly orthogonal is made so.
  layer->set_weight(matrix({1, 3e-5, 0, 1}));
  EXPECT_LT(distance_from_orthogonal(layer->weight()), 1e-7);
}

TEST_F(Conv1x1Weight, StaysOrthogonalWhateverIsLearnt) {
  memcnn::Conv1x1 layer = made_conv1x1(8, memcnn::kOrthogonal);
  torch::optim::SGD optimizer(layer->parameters(), /*lr=*/1);
  for (int step = 0; step < 50; ++step) {
    optimizer.zero_grad();
    layer(torch::randn({4, 8, 3})).pow(3).sum().backward();
    optimizer.step();
  }
  EXPECT_GT(layer->parameters()[0].abs().max().item<double>(), 1);
  EXPECT_LT(distance_from_orthogonal(layer->weight()), 1e-6);
}

TEST_F(Conv1x1Weight, IsLearntByAllParametrizations) {
  for (const auto kind : {memcnn::kPlain, memcnn::kLU, memcnn::kOrthogonal}) {
    memcnn::Conv1x1 layer = made_conv1x1(3, kind);
    const Tensor target = made_conv1x1(3, memcnn::kOrthogonal)->weight();
    layer->weight().sub(target.detach()).square().sum().backward();
    for (const Tensor& parameter : layer->parameters()) {
      EXPECT_TRUE(parameter.grad().defined());
    }
  }
}

TEST_F(Conv1x1Weight, IsThatOfLUByDefault) {
  EXPECT_EQ(memcnn::Conv1x1(3)->options().parametrization(), memcnn::kLU);
}

} // namespace
} // namespace memcnn_test
