// SPDX-License-Identifier: MIT

#include "../support/flow_layer_checks.h"
#include "../support/invertible_suite.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <vector>

namespace memcnn_test {

using testing::HasSubstr;
using torch::Tensor;

using Strides = std::vector<int64_t>;

namespace {

memcnn::OrthogonalDownsampling made_downsampling(
    int64_t channels,
    const Strides& strides,
    memcnn::DownsamplingStart start = memcnn::kHaar) {
  return memcnn::OrthogonalDownsampling(
      channels, strides, memcnn::OrthogonalDownsamplingOptions().start(start));
}

} // namespace

struct DownsamplingImages {
  static constexpr const char* kName = "Images";
  static constexpr bool kUsesAutocast = false;
  /// Not at the start, where `skew` is zero in every one.
  static auto make() {
    auto layer = made_downsampling(2, {2, 2});
    const torch::NoGradGuard no_grad;
    layer->parameters()[0].normal_();
    return layer;
  }
  static std::vector<int64_t> shape() {
    return {2, 2, 4, 2};
  }
  static std::vector<int64_t> output_shape() {
    return {2, 8, 2, 1};
  }
  static std::string printed() {
    return "memcnn::OrthogonalDownsampling(2, strides=[2, 2])";
  }
};

struct DownsamplingVolumes : DownsamplingImages {
  static constexpr const char* kName = "Volumes";
  static auto make() {
    auto layer = made_downsampling(2, {1, 2, 2}, memcnn::kSqueeze);
    const torch::NoGradGuard no_grad;
    layer->parameters()[0].normal_();
    return layer;
  }
  static std::vector<int64_t> shape() {
    return {2, 2, 2, 4, 2};
  }
  static std::vector<int64_t> output_shape() {
    return {2, 8, 2, 2, 1};
  }
  static std::string printed() {
    return "memcnn::OrthogonalDownsampling(2, strides=[1, 2, 2])";
  }
};

MEMCNN_INVERTIBLE_SUITE(
    OrthogonalDownsampling,
    DownsamplingImages,
    DownsamplingVolumes);

namespace {

/// |Q Q^T - I|, the largest entry.
double distance_from_orthogonal(const Tensor& matrices) {
  const Tensor wide = matrices.detach().to(torch::kDouble);
  return (wide.matmul(wide.mT()) - torch::eye(wide.size(-1), torch::kDouble))
      .abs()
      .max()
      .item<double>();
}

class OrthogonalDownsampling : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(3);
  }
};

TEST_F(OrthogonalDownsampling, BeginsAsHaar) {
  memcnn::OrthogonalDownsampling down(2, {2, 2});
  const Tensor x = torch::tensor({1.f, 2.f, 3.f, 4.f}).view({1, 1, 2, 2});
  const Tensor y = down(torch::cat({x, 2 * x}, 1));
  EXPECT_EQ(y.sizes(), at::IntArrayRef({1, 8, 1, 1}));
  EXPECT_TRUE(torch::allclose(
      y.flatten(),
      torch::tensor({5.f, -1.f, -2.f, 0.f, 10.f, -2.f, -4.f, 0.f}),
      /*rtol=*/1e-6,
      /*atol=*/1e-6));
  const Tensor volume =
      memcnn::OrthogonalDownsampling(1, {2, 2, 2})(torch::ones({1, 1, 2, 2, 2}))
          .flatten();
  EXPECT_NEAR(volume[0].item<double>(), 2.828427, 1e-6);
  EXPECT_LT(volume.slice(0, 1).abs().max().item<double>(), 1e-6);
}

TEST_F(OrthogonalDownsampling, BeginsAsSqueezeByOption) {
  const Tensor x = torch::randn({2, 3, 4, 6});
  EXPECT_TRUE(made_downsampling(3, {2, 2}, memcnn::kSqueeze)(x).equal(
      torch::pixel_unshuffle(x, 2)));
  // And where there is no Haar of its strides.
  EXPECT_TRUE(made_downsampling(3, {4, 2})(x).equal(
      memcnn::detail::squeezed(x, {4, 2})));
  EXPECT_TRUE(made_downsampling(3, {1, 3})(x).equal(
      memcnn::detail::squeezed(x, {1, 3})));
}

/// Streams, each with strides that fit it.
struct Case {
  Strides strides;
  Tensor x;
};

std::vector<Case> cases() {
  const auto normal = [](at::IntArrayRef sizes) {
    return torch::randn(sizes, torch::kDouble);
  };
  return {
      {{2}, normal({2, 3, 6})},
      {{2, 2}, normal({2, 2, 4, 2})},
      {{2, 2},
       normal({2, 2, 4, 2}).contiguous(torch::MemoryFormat::ChannelsLast)},
      {{3, 1}, normal({2, 2, 3, 4})},
      {{1, 2, 2}, normal({2, 2, 3, 2, 2})}};
}

TEST_F(OrthogonalDownsampling, InverseRecoversInput) {
  const torch::NoGradGuard no_grad;
  for (const Case& each : cases()) {
    auto down = moved(made_downsampling(each.x.size(1), each.strides));
    const Tensor y = down(each.x);
    EXPECT_NEAR(
        y.norm().item<double>() / each.x.norm().item<double>(), 1, 1e-14);
    EXPECT_LT(relative_error(down->inverse(y), each.x), kRoundTripFloat64);
    EXPECT_EQ(y.suggest_memory_format(), each.x.suggest_memory_format());
    EXPECT_TRUE(memcnn::detail::is_sole_owner(down(each.x)));
    EXPECT_TRUE(memcnn::detail::is_sole_owner(down->inverse(y)));
    for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      const Tensor narrow = each.x.to(dtype);
      const Tensor again = down->inverse(down(narrow));
      EXPECT_EQ(again.scalar_type(), dtype);
      EXPECT_LT(relative_error(again, narrow), round_trip_tolerance(dtype));
    }
  }
}

TEST_F(OrthogonalDownsampling, GradientsMatchPlainAutograd) {
  for (const Case& each : cases()) {
    auto down = moved(made_downsampling(each.x.size(1), each.strides));
    memcnn::ReversibleSequence saving(down);
    for (const auto direction :
         {memcnn::Direction::kForward, memcnn::Direction::kInverse}) {
      const torch::NoGradGuard no_grad;
      const Tensor start = direction == memcnn::Direction::kForward
          ? each.x
          : memcnn::detail::squeezed(each.x, each.strides);
      const torch::AutoGradMode with_graph(true);
      const Tensor x = start.detach().requires_grad_();
      std::vector<Tensor> leaves = down->parameters();
      leaves.push_back(x);
      const Tensor weights = torch::randn(each.x.numel(), torch::kDouble);
      const auto gradients = [&](auto& flow) {
        const auto result =
            map_with_log_det(*flow, direction, made_by_a_layer(x));
        EXPECT_TRUE(
            result.log_det.equal(torch::zeros(x.size(0), torch::kDouble)));
        return torch::autograd::grad(
            {(result.output.flatten() * weights).sum()}, leaves);
      };
      auto plain = down;
      const auto expected = gradients(plain);
      EXPECT_LT(relative_error(gradients(saving), expected), kGradientFloat64)
          << memcnn::name_of(direction) << " " << x.sizes();
    }
  }
}

TEST_F(OrthogonalDownsampling, LogDetMatchesJacobian) {
  auto down = moved(made_downsampling(2, {2, 2}));
  const Tensor x = torch::randn({2, 2, 2, 4}, torch::kDouble);
  const Tensor found = log_det_of_jacobian(
      [&](const Tensor& leaf) { return down->forward(leaf); }, x);
  EXPECT_LT(found.abs().max().item<double>(), 1e-12);
}

TEST_F(OrthogonalDownsampling, StaysOrthogonalWhateverIsLearnt) {
  auto down = made_downsampling(2, {2, 2});
  torch::optim::SGD optimizer(down->parameters(), /*lr=*/1);
  const Tensor before = down->weight().detach();
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    down(torch::randn({4, 2, 4, 4})).pow(3).sum().backward();
    optimizer.step();
  }
  EXPECT_GT(relative_error(down->weight(), before), 0.1);
  EXPECT_LT(distance_from_orthogonal(down->weight()), 1e-6);
}

TEST_F(OrthogonalDownsampling, GoesDownAndUpInASequence) {
  auto down = moved(made_downsampling(4, {2, 2}));
  memcnn::ReversibleSequence flow(down);
  const Tensor x = torch::randn({2, 4, 4, 4}, torch::kDouble);
  const torch::NoGradGuard no_grad;
  EXPECT_LT(
      relative_error(flow->inverse(flow->forward(x)), x), kRoundTripFloat64);
}

TEST_F(OrthogonalDownsampling, RejectsWhatDoesNotFit) {
  auto down = made_downsampling(2, {2, 2});
  EXPECT_THAT(
      [&] {
        down(torch::ones({1, 2, 4, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "OrthogonalDownsampling::forward(): expected sizes that are multiples "
          "of the strides [2, 2] after the channels, but got sizes [1, 2, 4, 3], "
          "Float, cpu. Pad the input, or crop it.")));
  EXPECT_THAT(
      [&] {
        down(torch::ones({1, 2, 4}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "OrthogonalDownsampling::forward(): expected an input (N, C, *) with "
          "a dim for each of the strides [2, 2], but got sizes [1, 2, 4], Float, "
          "cpu. Construct the layer with a stride for each dimension after the "
          "channels.")));
  EXPECT_THAT(
      [&] {
        down->inverse(torch::ones({1, 2, 4, 4}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "OrthogonalDownsampling::inverse(): expected an input (N, C, *) with "
          "C = 8 channels, but got 2")));
  EXPECT_THAT(
      [&] {
        down(torch::ones({1, 2, 4, 4}, torch::kLong));
      },
      ThrowsError<c10::TypeError>(HasSubstr("floating point")));
  for (const Strides& strides : {Strides{}, {0}, {1, 1, 1, 1}}) {
    EXPECT_THAT(
        [&] { made_downsampling(2, strides); },
        ThrowsError<c10::ValueError>(HasSubstr(
            "OrthogonalDownsampling::OrthogonalDownsampling(): expected one to "
            "three strides from 1 on, but got [")));
  }
  EXPECT_THAT(
      [&] { made_downsampling(0, {2}); },
      ThrowsError<c10::ValueError>(HasSubstr("expected at least 1 channel")));
}

} // namespace
} // namespace memcnn_test
