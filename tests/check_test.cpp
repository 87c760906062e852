// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/check.h>
#include <memcnn/coupling/adapters.h>
#include <memcnn/coupling/additive.h>
#include <memcnn/coupling/affine.h>
#include <memcnn/coupling/unchanged.h>
#include <memcnn/flow/multi_scale.h>
#include <memcnn/log_det.h>
#include <memcnn/sequence.h>
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

/// y = sinh(x), whose log-determinant is that of cosh(x): what it says of it is put
/// together in a test.
struct SinhImpl final : torch::nn::Cloneable<SinhImpl> {
  using LogDetOf = std::function<torch::Tensor(const torch::Tensor&)>;
  explicit SinhImpl(LogDetOf log_det_) : log_det(std::move(log_det_)) {}
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return x.sinh();
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y.asinh();
  }
  memcnn::WithLogDet forward_with_log_det(torch::Tensor x) {
    return {x.sinh() + offset, log_det(x)};
  }
  memcnn::WithLogDet inverse_with_log_det(torch::Tensor y) {
    return {y.asinh(), -log_det(y.asinh()) * inverse_factor};
  }
  LogDetOf log_det;
  double inverse_factor = 1;
  double offset = 0;
};
TORCH_MODULE(Sinh);

torch::Tensor log_det_of_sinh(const torch::Tensor& x) {
  return x.cosh().log().flatten(1).sum(1);
}

/// y = 2 x, and says that it keeps volumes.
struct LiarImpl final : torch::nn::Module, memcnn::PreservesVolume {
  torch::Tensor forward(torch::Tensor x) {
    return x * 2;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y / 2;
  }
};
TORCH_MODULE(Liar);

/// y = x e^c under a condition c.
struct ScaledByImpl final : torch::nn::Module {
  torch::Tensor forward(torch::Tensor x, torch::Tensor c) {
    return x * c.exp();
  }
  torch::Tensor inverse(torch::Tensor y, torch::Tensor c) {
    return y * (-c).exp();
  }
  memcnn::WithLogDet forward_with_log_det(torch::Tensor x, torch::Tensor c) {
    return {forward(x, c), c.flatten(1).sum(1)};
  }
  memcnn::WithLogDet inverse_with_log_det(torch::Tensor y, torch::Tensor c) {
    return {inverse(y, c), -c.flatten(1).sum(1)};
  }
};
TORCH_MODULE(ScaledBy);

/// A coupling whose scales depend on the other half.
auto affine_coupling() {
  return memcnn::AffineCoupling(
      memcnn::AffineAdapterTanh(WideBranch(2)),
      memcnn::AffineAdapterSigmoid(WideBranch(2)));
}

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

// Log-determinants.

constexpr double kNotMeasured = std::numeric_limits<double>::infinity();

TEST_F(InvertibilityCheck, MeasuresLogDeterminants) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    auto coupling = affine_coupling();
    coupling->to(dtype);
    const auto report = memcnn::check_invertible_module(coupling, {2, 4, 4, 4});
    EXPECT_TRUE(report.invertible) << report.reason;
    EXPECT_TRUE(report.warnings.empty());
    const double bound = dtype == torch::kDouble ? 1e-12 : 1e-4;
    EXPECT_LT(report.log_det_error, bound);
    EXPECT_GT(report.log_det_error, 0); // measured
    EXPECT_LT(report.inverse_log_det_error, bound);
  }
}

TEST_F(InvertibilityCheck, AWrongLogDeterminantIsNot) {
  const std::vector<std::pair<const char*, Sinh::Impl::LogDetOf>> wrong = {
      {"sign",
       [](const auto& x) {
         return -log_det_of_sinh(x);
       }},
      {"mean of the batch",
       [](const auto& x) {
         return log_det_of_sinh(x).mean().expand({x.size(0)});
       }},
      {"sum of the batch",
       [](const auto& x) {
         return log_det_of_sinh(x).sum().expand({x.size(0)});
       }},
      {"without its pixels",
       [](const auto& x) {
         return log_det_of_sinh(x) / (x[0][0].numel());
       }},
      {"samples exchanged",
       [](const auto& x) {
         return log_det_of_sinh(x).flip(0);
       }},
      {"zero",
       [](const auto& x) {
         return torch::zeros({x.size(0)});
       }},
  };
  for (const auto& [what, log_det] : wrong) {
    SCOPED_TRACE(what);
    const auto report =
        memcnn::check_invertible_module(Sinh(log_det), {2, 2, 3, 3});
    EXPECT_FALSE(report.invertible);
    EXPECT_GT(report.log_det_error, 0.1);
    EXPECT_LT(report.inverse_log_det_error, 1e-5);
    EXPECT_LT(report.round_trip_error, 1e-5);
    EXPECT_THAT(
        report.reason,
        AllOf(
            HasSubstr("differs from that of the Jacobian"), HasSubstr("atol")));
  }
  EXPECT_TRUE(
      memcnn::is_invertible_module(Sinh(log_det_of_sinh), {2, 2, 3, 3}));
}

TEST_F(InvertibilityCheck, AWrongLogDeterminantOfTheInverseIsNot) {
  Sinh sinh(log_det_of_sinh);
  sinh->inverse_factor = -1; // as if it were that of forward
  const auto report = memcnn::check_invertible_module(sinh, {2, 6});
  EXPECT_FALSE(report.invertible);
  EXPECT_LT(report.log_det_error, 1e-5);
  EXPECT_GT(report.inverse_log_det_error, 0.1);
  EXPECT_THAT(
      report.reason,
      HasSubstr("log-determinant of inverse(y) differs from minus that"));
}

TEST_F(InvertibilityCheck, AnotherOutputWithTheLogDeterminantIsNot) {
  Sinh sinh(log_det_of_sinh);
  sinh->offset = 0.5;
  const auto report = memcnn::check_invertible_module(sinh, {2, 6});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(
      report.reason,
      HasSubstr("forward_with_log_det() differs from forward() by up to 0.5"));
}

TEST_F(InvertibilityCheck, ALogDeterminantOfNaNIsNot) {
  const auto report = memcnn::check_invertible_module(
      Sinh([](const auto& x) { return log_det_of_sinh(x) * NAN; }), {2, 6});
  EXPECT_FALSE(report.invertible);
  EXPECT_TRUE(std::isnan(report.log_det_error));
  EXPECT_TRUE(std::isnan(report.inverse_log_det_error));
}

TEST_F(InvertibilityCheck, VolumesThatAreNotKeptAreNot) {
  const auto report = memcnn::check_invertible_module(Liar(), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_NEAR(report.log_det_error, 6 * std::log(2), 1e-5); // of the batch
}

TEST_F(InvertibilityCheck, ALogDeterminantNeedsAsManyOutputsAsInputs) {
  // Undone, but no map with a determinant: a zero is added to each sample.
  struct PadImpl : torch::nn::Module, memcnn::PreservesVolume {
    torch::Tensor forward(torch::Tensor x) {
      return torch::constant_pad_nd(x, {0, 1});
    }
    torch::Tensor inverse(torch::Tensor y) {
      return y.slice(1, 0, -1).clone();
    }
  };
  const auto report =
      memcnn::check_invertible_module(std::make_shared<PadImpl>(), {2, 3});
  EXPECT_FALSE(report.invertible);
  EXPECT_THAT(report.reason, HasSubstr("turns 6 values into 8"));
}

TEST_F(InvertibilityCheck, SamplesMayDependOnEachOther) {
  memcnn::AffineCoupling coupling(
      memcnn::AffineAdapterTanh(torch::nn::Sequential(
          torch::nn::Conv2d(2, 4, 1), torch::nn::BatchNorm2d(4))),
      memcnn::Unchanged());
  coupling->to(torch::kDouble);
  const auto report = memcnn::check_invertible_module(coupling, {3, 4, 2, 2});
  EXPECT_TRUE(report.invertible) << report.reason;
  EXPECT_LT(report.log_det_error, 1e-12);
}

TEST_F(InvertibilityCheck, WithoutALogDeterminantNoneIsMeasured) {
  for (const auto& report :
       {memcnn::check_invertible_module(Maps(twice, halved), {2, 3}),
        memcnn::check_invertible_module(Shear(), {{2, 3}, {2, 3}}),
        memcnn::check_invertible_module(
            memcnn::InvertibleModuleWrapper(Maps(twice, halved)), {2, 3}),
        memcnn::check_invertible_module(
            memcnn::ReversibleSequence(Maps(twice, halved)), {2, 3})}) {
    EXPECT_TRUE(report.invertible) << report.reason;
    EXPECT_TRUE(report.warnings.empty());
    EXPECT_EQ(report.log_det_error, kNotMeasured);
    EXPECT_EQ(report.inverse_log_det_error, kNotMeasured);
  }
}

TEST_F(InvertibilityCheck, WarnsWhereNoJacobianIsTaken) {
  const auto at_most =
      memcnn::check_invertible_module(Sinh(log_det_of_sinh), {2, 256});
  EXPECT_TRUE(at_most.warnings.empty());
  EXPECT_LT(at_most.log_det_error, 1e-3);

  const auto large =
      memcnn::check_invertible_module(Sinh(log_det_of_sinh), {3, 171});
  EXPECT_TRUE(large.invertible) << large.reason;
  EXPECT_EQ(large.log_det_error, kNotMeasured);
  EXPECT_LT(large.inverse_log_det_error, 1e-3);
  ASSERT_EQ(large.warnings.size(), 1u);
  EXPECT_THAT(
      large.warnings[0], AllOf(HasSubstr("513 values"), HasSubstr("most 512")));
}

TEST_F(InvertibilityCheck, WarnsWhereTheModuleRefusesALogDeterminant) {
  memcnn::AffineCoupling of_samples(
      memcnn::AffineAdapterNaive(torch::nn::Linear(3, 3)),
      memcnn::AffineAdapterNaive(torch::nn::Linear(3, 3)),
      memcnn::CouplingOptions().split_dim(0));
  const auto report = memcnn::check_invertible_module(of_samples, {2, 3});
  EXPECT_TRUE(report.invertible) << report.reason;
  EXPECT_EQ(report.log_det_error, kNotMeasured);
  ASSERT_EQ(report.warnings.size(), 1u);
  EXPECT_THAT(
      report.warnings[0],
      AllOf(HasSubstr("not measured"), HasSubstr("split_dim")));
}

TEST_F(InvertibilityCheck, GradientsAreThoseOfLogDeterminantsToo) {
  // Without the log-determinant the gradient is that of a linear map.
  struct SquareImpl : torch::nn::Module {
    torch::Tensor forward(torch::Tensor x) {
      return x * 2;
    }
    torch::Tensor inverse(torch::Tensor y) {
      return y * 0.55;
    }
    memcnn::WithLogDet forward_with_log_det(torch::Tensor x) {
      return {x * 2, x.square().sum(1)};
    }
    memcnn::WithLogDet inverse_with_log_det(torch::Tensor y) {
      return {y * 0.55, -(y / 2).square().sum(1)};
    }
  };
  const auto report =
      memcnn::check_invertible_module(std::make_shared<SquareImpl>(), {2, 3});
  EXPECT_GT(report.gradient_error, 0.01);
}

TEST_F(InvertibilityCheck, FrontEndsAreMeasuredAsTheyRun) {
  auto coupling = affine_coupling();
  memcnn::MultiScale flow(
      coupling,
      memcnn::AffineCoupling(
          memcnn::AffineAdapterTanh(torch::nn::Conv2d(1, 2, 1)),
          memcnn::Unchanged()));
  flow->to(torch::kDouble); // the coupling's parameters, too
  const auto check = [](const auto& front_end) {
    const auto report =
        memcnn::check_invertible_module(front_end, {2, 4, 3, 3});
    EXPECT_TRUE(report.invertible) << report.reason;
    EXPECT_TRUE(report.warnings.empty());
    EXPECT_LT(report.log_det_error, 1e-12);
    EXPECT_GT(report.log_det_error, 0);
    EXPECT_LT(report.inverse_log_det_error, 1e-12);
    EXPECT_LT(report.gradient_error, kGradientFloat64);
  };
  check(memcnn::InvertibleModuleWrapper(coupling));
  memcnn::ReversibleSequence chain(coupling, affine_coupling());
  chain->to(torch::kDouble);
  check(chain);
  check(flow);

  memcnn::MultiScale without(Maps(twice, halved));
  EXPECT_EQ(
      memcnn::check_invertible_module(without, {2, 3}).log_det_error,
      kNotMeasured);
}

TEST_F(InvertibilityCheck, RunsUnderConditions) {
  const auto under =
      memcnn::IsInvertibleOptions().conditions({torch::randn({2, 3})});
  const auto check = [&](const auto& module) {
    const auto report = memcnn::check_invertible_module(module, {2, 3}, under);
    EXPECT_TRUE(report.invertible) << report.reason;
    EXPECT_LT(report.log_det_error, 1e-5);
    EXPECT_LT(report.gradient_error, kGradientFloat32);
  };
  check(ScaledBy());
  check(memcnn::InvertibleModuleWrapper(ScaledBy()));
  check(memcnn::ReversibleSequence(ScaledBy(), ScaledBy()));
  check(memcnn::MultiScale(ScaledBy()));

  const auto without = memcnn::check_invertible_module(ScaledBy(), {2, 3});
  EXPECT_FALSE(without.invertible);
  EXPECT_THAT(without.reason, HasSubstr("expected 1 conditions, but got 0"));
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
