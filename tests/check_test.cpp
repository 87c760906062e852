// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/check.h>
#include <memcnn/coupling/additive.h>
#include <memcnn/coupling/affine.h>
#include <memcnn/wrapper.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// A module that is put together in a test: what its maps do, and what they
/// saw.
struct MapsImpl final : torch::nn::Cloneable<MapsImpl> {
  using Map = std::function<torch::Tensor(const torch::Tensor&)>;
  MapsImpl(Map forward_, Map inverse_)
      : forward_map(std::move(forward_)), inverse_map(std::move(inverse_)) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    seen.push_back(x.detach().clone());
    return forward_map(x);
  }
  torch::Tensor inverse(torch::Tensor y) {
    return inverse_map(y);
  }
  Map forward_map;
  Map inverse_map;
  std::vector<torch::Tensor> seen;
};
TORCH_MODULE(Maps);

/// y1 = a + b, y2 = b.
struct ShearImpl final : torch::nn::Cloneable<ShearImpl> {
  using Pair = std::tuple<torch::Tensor, torch::Tensor>;
  void reset() override {}
  Pair forward(torch::Tensor a, torch::Tensor b) {
    sizes = {a.sizes().vec(), b.sizes().vec()};
    return {a + b, b * 2};
  }
  Pair inverse(torch::Tensor a, torch::Tensor b) {
    return {a - b / 2, b / 2};
  }
  std::vector<std::vector<int64_t>> sizes;
};
TORCH_MODULE(Shear);

torch::Tensor twice(const torch::Tensor& x) {
  return x * 2;
}
torch::Tensor halved(const torch::Tensor& y) {
  return y / 2;
}

class InvertibilityCheck : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

TEST_F(InvertibilityCheck, AcceptsCouplingsAndTheirWrapper) {
  memcnn::AdditiveCoupling additive(ConvBranch(32), ConvBranch(32));
  EXPECT_TRUE(memcnn::is_invertible_module(additive, {2, 64, 8, 8}));
  memcnn::AffineCoupling affine(
      memcnn::AffineAdapterSigmoid(WideBranch(2)),
      memcnn::AffineAdapterSigmoid(WideBranch(2)));
  EXPECT_TRUE(memcnn::is_invertible_module(affine, {2, 4, 8, 8}));
  EXPECT_TRUE(memcnn::is_invertible_module(
      memcnn::InvertibleModuleWrapper(additive), {2, 64, 8, 8}));
}

TEST_F(InvertibilityCheck, AcceptsPointersAndOwnModules) {
  EXPECT_TRUE(memcnn::is_invertible_module(Maps(twice, halved), {2, 3}));
  EXPECT_TRUE(memcnn::is_invertible_module(
      std::make_shared<MapsImpl>(twice, halved), {2, 3}));
}

TEST_F(InvertibilityCheck, FollowsTheModulesMode) {
  // In train mode each call of a dropout network is another map.
  memcnn::AdditiveCoupling coupling(DropoutBranch(2), DropoutBranch(2));
  EXPECT_FALSE(memcnn::is_invertible_module(coupling, {2, 4, 8, 8}));
  coupling->eval();
  EXPECT_TRUE(memcnn::is_invertible_module(coupling, {2, 4, 8, 8}));
}

TEST_F(InvertibilityCheck, ReportsWhatItMeasured) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  coupling->to(torch::kDouble);
  const memcnn::InvertibilityReport report =
      memcnn::check_invertible_module(coupling, {2, 4, 8, 8});
  EXPECT_TRUE(report.invertible) << report.reason;
  EXPECT_EQ(report.reason, "");
  EXPECT_TRUE(report.warnings.empty());
  EXPECT_LT(report.round_trip_error, 1e-13);
  EXPECT_LT(report.inverse_round_trip_error, 1e-13);
  EXPECT_LT(report.gradient_error, kGradientFloat64);
  // Numbers that were measured, not left at 0.
  EXPECT_GT(report.round_trip_error + report.inverse_round_trip_error, 0);
  EXPECT_GT(report.gradient_error, 0);
}

TEST_F(InvertibilityCheck, MeasuresBothRoundTrips) {
  // inverse(forward(x)) is x + 0.25 and forward(inverse(y)) is y + 0.5.
  const auto report = memcnn::check_invertible_module(
      Maps(twice, [](const auto& y) { return y / 2 + 0.25; }), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_NEAR(report.round_trip_error, 0.25, 1e-6);
  EXPECT_NEAR(report.inverse_round_trip_error, 0.5, 1e-6);
  EXPECT_EQ(report.gradient_error, 0); // the same everywhere: the map is linear
}

TEST_F(InvertibilityCheck, MeasuresTheGradientError) {
  // d/dx of sum(w x^3) is 3 w x^2: at 1.1 x it is off by 1.21 - 1.
  const auto report = memcnn::check_invertible_module(
      Maps(
          [](const auto& x) { return x * x * x; },
          [](const auto& y) { return y.sign() * y.abs().pow(1. / 3) * 1.1; }),
      {5, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_NEAR(report.gradient_error, 0.21, 1e-4);
}

TEST_F(InvertibilityCheck, TolerancesAreOptions) {
  const Maps off_by_a_little(twice, [](const auto& y) { return y / 2 + 1e-3; });
  EXPECT_FALSE(memcnn::is_invertible_module(off_by_a_little, {4, 4}));
  EXPECT_TRUE(memcnn::is_invertible_module(
      off_by_a_little, {4, 4}, memcnn::IsInvertibleOptions().atol(1e-2)));
  const Maps off_by_a_factor(
      twice, [](const auto& y) { return y / 2 * (1 + 1e-3); });
  EXPECT_FALSE(memcnn::is_invertible_module(off_by_a_factor, {4, 4}));
  EXPECT_TRUE(memcnn::is_invertible_module(
      off_by_a_factor, {4, 4}, memcnn::IsInvertibleOptions().rtol(1e-2)));
  EXPECT_EQ(memcnn::IsInvertibleOptions().atol(), 1e-6);
  EXPECT_EQ(memcnn::IsInvertibleOptions().rtol(), 1e-5);
  EXPECT_EQ(memcnn::IsInvertibleOptions().random_seed(), 42u);
}

TEST_F(InvertibilityCheck, TheSeedDecidesTheInputs) {
  const auto seen = [](uint64_t seed) {
    Maps maps(twice, halved);
    memcnn::is_invertible_module(
        maps, {3, 3}, memcnn::IsInvertibleOptions().random_seed(seed));
    return maps->seen[0];
  };
  EXPECT_TRUE(seen(7).equal(seen(7)));
  EXPECT_FALSE(seen(7).equal(seen(8)));
}

// What is not invertible.

TEST_F(InvertibilityCheck, AModuleWithoutInverseIsNot) {
  EXPECT_FALSE(memcnn::is_invertible_module(torch::nn::Linear(2, 2), {2, 2}));
  const auto report =
      memcnn::check_invertible_module(torch::nn::Linear(2, 2), {2, 2});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(
      report.reason,
      AllOf(HasSubstr("Linear"), HasSubstr("no member inverse")));
  EXPECT_EQ(report.round_trip_error, std::numeric_limits<double>::infinity());
  // Its forward is a template.
  EXPECT_FALSE(memcnn::is_invertible_module(torch::nn::Sequential(), {2, 2}));
}

TEST_F(InvertibilityCheck, AWrongInverseIsNot) {
  const auto report =
      memcnn::check_invertible_module(Maps(twice, twice), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_GT(report.round_trip_error, 0.1);
  EXPECT_THAT(
      report.reason,
      AllOf(HasSubstr("differs from"), HasSubstr("up to"), HasSubstr("atol")));
}

TEST_F(InvertibilityCheck, ChangingTheInputInPlaceHidesNoError) {
  const auto report = memcnn::check_invertible_module(
      Maps(
          [](torch::Tensor x) { return x.mul_(2); },
          [](const auto& y) { return y; }),
      {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_GT(report.round_trip_error, 0.1);
}

TEST_F(InvertibilityCheck, OneRoundTripOfTwoIsNotEnough) {
  // Each forward adds one more than the last.
  const auto report = memcnn::check_invertible_module(
      Maps(
          [calls = 0](const auto& x) mutable { return x + calls++; },
          [](const auto& y) { return y.clone(); }),
      {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_EQ(report.round_trip_error, 0);
  EXPECT_GT(report.inverse_round_trip_error, 0.5);
  EXPECT_THAT(report.reason, HasSubstr("forward(inverse(y)) differs from y"));
}

TEST_F(InvertibilityCheck, AThrowingMapIsNot) {
  const Maps::Impl::Map throws = [](const torch::Tensor&) -> torch::Tensor {
    throw std::domain_error("no way back");
  };
  const auto report =
      memcnn::check_invertible_module(Maps(twice, throws), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(report.reason, HasSubstr("no way back"));
  EXPECT_FALSE(memcnn::is_invertible_module(Maps(throws, twice), {2, 3}));
}

TEST_F(InvertibilityCheck, AnotherDtypeOrDeviceIsNot) {
  // Backward would refuse such an input.
  for (const auto& [options, got] :
       {std::pair(torch::TensorOptions(torch::kDouble), "Double, cpu"),
        std::pair(torch::TensorOptions(torch::kMeta), "Float, meta")}) {
    const auto report = memcnn::check_invertible_module(
        Maps(
            twice,
            [options = options](const torch::Tensor& y) {
              return (y / 2).to(options);
            }),
        {2, 3});
    EXPECT_FALSE(report.invertible);
    EXPECT_THAT(
        report.reason,
        AllOf(HasSubstr("sizes [2, 3], Float, cpu"), HasSubstr(got)));
  }
}

TEST_F(InvertibilityCheck, AWrongShapeIsNot) {
  const auto report = memcnn::check_invertible_module(
      Maps(twice, [](const auto& y) { return y.sum(0) / 2; }), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(
      report.reason, AllOf(HasSubstr("sizes [2, 3]"), HasSubstr("sizes [3]")));
}

TEST_F(InvertibilityCheck, NaNIsNot) {
  const auto report = memcnn::check_invertible_module(
      Maps(
          [](const auto& x) { return x.sqrt(); },
          [](const auto& y) { return y * y; }),
      {20});
  EXPECT_FALSE(report.invertible);
  EXPECT_TRUE(std::isnan(report.round_trip_error));
}

TEST_F(InvertibilityCheck, ShapesThatDoNotFitAreNot) {
  memcnn::AdditiveCoupling coupling(ConvBranch(2), ConvBranch(2));
  const auto report = memcnn::check_invertible_module(coupling, {2, 7, 3, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(report.reason, HasSubstr("AdditiveCoupling::forward()"));
  // A message, not LibTorch's stack trace.
  EXPECT_EQ(report.reason.find("Exception raised from"), std::string::npos)
      << report.reason;
  EXPECT_FALSE(memcnn::is_invertible_module(Shear(), {2, 7}));
}

// Shapes.

TEST_F(InvertibilityCheck, ReadsOneShape) {
  Maps maps(twice, halved);
  EXPECT_TRUE(memcnn::is_invertible_module(maps, {1}));
  EXPECT_EQ(maps->seen[0].sizes(), (std::vector<int64_t>{1}));
  maps->seen.clear();
  EXPECT_TRUE(memcnn::is_invertible_module(maps, {3, 5}));
  EXPECT_EQ(maps->seen[0].sizes(), (std::vector<int64_t>{3, 5}));
  maps->seen.clear();
  const std::vector<int64_t> shape{2, 3, 4};
  EXPECT_TRUE(memcnn::is_invertible_module(maps, shape));
  EXPECT_EQ(maps->seen[0].sizes(), shape);
  maps->seen.clear();
  EXPECT_TRUE(memcnn::is_invertible_module(maps, torch::ones({6, 1}).sizes()));
  EXPECT_EQ(maps->seen[0].sizes(), (std::vector<int64_t>{6, 1}));
  maps->seen.clear();
  EXPECT_TRUE(memcnn::is_invertible_module(maps, {0, 3}));
  EXPECT_EQ(maps->seen[0].sizes(), (std::vector<int64_t>{0, 3}));
}

TEST_F(InvertibilityCheck, ReadsSeveralShapes) {
  using Shapes = std::vector<std::vector<int64_t>>;
  Shear shear;
  EXPECT_TRUE(memcnn::is_invertible_module(shear, {{2, 3}, {2, 3}}));
  EXPECT_EQ(shear->sizes, (Shapes{{2, 3}, {2, 3}}));
  EXPECT_TRUE(memcnn::is_invertible_module(shear, {{4}, {1}}));
  EXPECT_EQ(shear->sizes, (Shapes{{4}, {1}}));
  EXPECT_TRUE(memcnn::is_invertible_module(shear, Shapes{{5, 1}, {5, 1}}));
  EXPECT_EQ(shear->sizes, (Shapes{{5, 1}, {5, 1}}));
}

TEST_F(InvertibilityCheck, InputsTakeTheDtypeOfTheFirstParameter) {
  Maps maps(twice, halved);
  maps->register_parameter("weight", torch::ones({1}, torch::kDouble));
  EXPECT_TRUE(memcnn::is_invertible_module(maps, {3}));
  EXPECT_EQ(maps->seen[0].scalar_type(), torch::kDouble);
  Maps bare(twice, halved);
  EXPECT_TRUE(memcnn::is_invertible_module(bare, {3}));
  EXPECT_EQ(bare->seen[0].scalar_type(), torch::kFloat);

  memcnn::AdditiveCoupling coupling(ConvBranch(2), ConvBranch(2));
  coupling->to(torch::kDouble);
  EXPECT_TRUE(memcnn::is_invertible_module(coupling, {2, 4, 3, 3}));
}

// Nothing is changed.

TEST_F(InvertibilityCheck, LeavesTheModuleAndTheGeneratorAsFound) {
  memcnn::AdditiveCoupling coupling(ConvBranch(2), DropoutBranch(2));
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  coupling(x).sum().backward();
  coupling->f->eval();
  const auto copies = [](const std::vector<torch::Tensor>& tensors) {
    std::vector<torch::Tensor> result;
    for (const torch::Tensor& tensor : tensors) {
      result.push_back(tensor.defined() ? tensor.detach().clone() : tensor);
    }
    return result;
  };
  const auto gradients = [&] {
    std::vector<torch::Tensor> result;
    for (const torch::Tensor& parameter : coupling->parameters()) {
      result.push_back(parameter.grad());
    }
    return result;
  };
  const auto generator = [] {
    return at::globalContext()
        .defaultGenerator(at::Device(at::kCPU))
        .get_state();
  };
  const auto check_all = [&] {
    const auto parameters = copies(coupling->parameters());
    const auto buffers = copies(coupling->buffers());
    const auto before = copies(gradients());
    const auto handles = gradients();
    const torch::Tensor state = generator();
    memcnn::check_invertible_module(coupling, {2, 4, 3, 3});
    EXPECT_TRUE(all_equal(coupling->parameters(), parameters));
    EXPECT_TRUE(all_equal(coupling->buffers(), buffers));
    EXPECT_TRUE(all_equal(gradients(), before));
    for (size_t i = 0; i < handles.size(); ++i) {
      EXPECT_TRUE(gradients()[i].is_same(handles[i]));
    }
    EXPECT_TRUE(generator().equal(state));
  };
  check_all();
  EXPECT_FALSE(coupling->f->is_training());
  EXPECT_TRUE(coupling->g->is_training());
  coupling->train(); // a batch norm that counts
  check_all();
  coupling->zero_grad(); // undefined gradients stay undefined
  check_all();
}

TEST_F(InvertibilityCheck, LeavesTheModuleAsFoundWhenItThrows) {
  Maps maps(
      [](const auto& x) { return x + torch::rand_like(x); },
      [](const torch::Tensor&) -> torch::Tensor {
        throw std::domain_error("no way back");
      });
  const auto generator = [] {
    return at::globalContext()
        .defaultGenerator(at::Device(at::kCPU))
        .get_state();
  };
  maps->register_buffer("count", torch::zeros({1}));
  maps->forward_map = [&](const torch::Tensor& x) {
    maps->buffers()[0].add_(1);
    return x + torch::rand_like(x);
  };
  const torch::Tensor state = generator();
  EXPECT_FALSE(memcnn::is_invertible_module(maps, {2, 3}));
  EXPECT_FALSE(maps->seen.empty());
  EXPECT_EQ(maps->buffers()[0].item<float>(), 0);
  EXPECT_TRUE(generator().equal(state));
}

TEST_F(InvertibilityCheck, WorksWhereNoGraphIsRecorded) {
  const torch::NoGradGuard no_grad;
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  const auto report = memcnn::check_invertible_module(coupling, {2, 4, 3, 3});
  EXPECT_TRUE(report.invertible) << report.reason;
  EXPECT_LT(report.gradient_error, kGradientFloat32);
  EXPECT_FALSE(torch::GradMode::is_enabled());
}

// Warnings.

TEST_F(InvertibilityCheck, WarnsOfAnOutputOnItsInputsStorage) {
  const auto report = memcnn::check_invertible_module(
      Maps(
          [](const auto& x) { return x.flip(0).view_as(x); },
          [](const auto& y) { return y.flip(0); }),
      {2, 3});
  EXPECT_TRUE(report.invertible);
  EXPECT_TRUE(report.warnings.empty());

  const auto sharing = memcnn::check_invertible_module(
      Maps(
          [](const auto& x) { return x.t(); },
          [](const auto& y) { return y.t(); }),
      {2, 3});
  EXPECT_TRUE(sharing.invertible) << sharing.reason;
  ASSERT_EQ(sharing.warnings.size(), 1u);
  EXPECT_THAT(
      sharing.warnings[0], HasSubstr("output 0 shares the storage of input 0"));
}

TEST_F(InvertibilityCheck, WarnsOfAChangeInPlace) {
  const auto report = memcnn::check_invertible_module(
      Maps([](torch::Tensor x) { return x.mul_(2).clone(); }, halved), {2, 3});
  EXPECT_TRUE(report.invertible) << report.reason;
  ASSERT_EQ(report.warnings.size(), 1u);
  EXPECT_THAT(
      report.warnings[0], HasSubstr("forward() changes input 0 in place"));
}

} // namespace
} // namespace memcnn_test
