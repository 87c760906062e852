// SPDX-License-Identifier: MIT
//
// Squeeze and Haar.

#include "../support/invertible_suite.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/flow/haar.h>
#include <memcnn/flow/squeeze.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace memcnn_test {

using testing::HasSubstr;

struct SqueezeImages {
  static constexpr const char* kName = "Images";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::Squeeze(2);
  }
  static std::vector<int64_t> shape() {
    return {2, 3, 4, 8};
  }
  static std::vector<int64_t> output_shape() {
    return {2, 12, 2, 4};
  }
  static std::string printed() {
    return "memcnn::Squeeze(strides=[2])";
  }
};

struct SqueezeVolumes {
  static constexpr const char* kName = "VolumesInPlane";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::Squeeze({1, 2, 3});
  }
  static std::vector<int64_t> shape() {
    return {2, 1, 2, 4, 9};
  }
  static std::vector<int64_t> output_shape() {
    return {2, 6, 2, 2, 3};
  }
  static std::string printed() {
    return "memcnn::Squeeze(strides=[1, 2, 3])";
  }
};

MEMCNN_INVERTIBLE_SUITE(Squeeze, SqueezeImages, SqueezeVolumes);

template <int64_t dims>
struct HaarOf {
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return memcnn::Haar();
  }
  static std::vector<int64_t> shape() {
    std::vector<int64_t> shape(2 + dims, 4);
    shape[0] = 2;
    shape[1] = dims < 3 ? 2 : 1;
    return shape;
  }
  static std::vector<int64_t> output_shape() {
    std::vector<int64_t> shape(2 + dims, 2);
    shape[1] = HaarOf::shape()[1] << dims;
    return shape;
  }
  static std::string printed() {
    return "memcnn::Haar()";
  }
};
struct HaarSignals : HaarOf<1> {
  static constexpr const char* kName = "Signals";
};
struct HaarImages : HaarOf<2> {
  static constexpr const char* kName = "Images";
};
struct HaarVolumes : HaarOf<3> {
  static constexpr const char* kName = "Volumes";
};

MEMCNN_INVERTIBLE_SUITE(Haar, HaarSignals, HaarImages, HaarVolumes);

namespace {

TEST(Squeeze, MovesBlocksOfPixelsToChannels) {
  const torch::Tensor x = torch::arange(16, torch::kFloat).view({1, 1, 4, 4});
  const torch::Tensor expected = torch::tensor(
      {{{{0.f, 2.f}, {8.f, 10.f}},
        {{1.f, 3.f}, {9.f, 11.f}},
        {{4.f, 6.f}, {12.f, 14.f}},
        {{5.f, 7.f}, {13.f, 15.f}}}});
  EXPECT_TRUE(memcnn::Squeeze(2)(x).equal(expected));
  EXPECT_TRUE(memcnn::Squeeze(2)->inverse(expected).equal(x));
}

TEST(Squeeze, IsPixelUnshuffle) {
  const torch::Tensor x = torch::randn({2, 3, 6, 9});
  EXPECT_TRUE(memcnn::Squeeze(3)(x).equal(torch::pixel_unshuffle(x, 3)));
}

TEST(Squeeze, HasAStrideForEachDimension) {
  const torch::Tensor volume = torch::randn({2, 3, 5, 4, 6});
  const torch::Tensor y = memcnn::Squeeze({1, 2, 2})(volume);
  for (int64_t i = 0; i < volume.size(2); ++i) {
    EXPECT_TRUE(
        y.select(2, i).equal(torch::pixel_unshuffle(volume.select(2, i), 2)));
  }
  const torch::Tensor signal = torch::arange(6, torch::kFloat).view({1, 1, 6});
  EXPECT_TRUE(memcnn::Squeeze(3)(signal).equal(
      torch::tensor({{{0.f, 3.f}, {1.f, 4.f}, {2.f, 5.f}}})));
  EXPECT_EQ(memcnn::Squeeze(2)(volume.narrow(2, 0, 4)).size(1), 24);
}

TEST(Squeeze, KeepsTheMemoryFormat) {
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  const torch::Tensor x = torch::randn({2, 4, 8, 8});
  memcnn::Squeeze squeeze(2);
  memcnn::Haar haar;
  const torch::Tensor y = squeeze(x.contiguous(kChannelsLast));
  EXPECT_TRUE(y.is_contiguous(kChannelsLast));
  EXPECT_TRUE(y.equal(squeeze(x)));
  EXPECT_TRUE(squeeze->inverse(y).is_contiguous(kChannelsLast));
  EXPECT_TRUE(haar(x.contiguous(kChannelsLast)).is_contiguous(kChannelsLast));
  EXPECT_TRUE(haar(x.contiguous(kChannelsLast).requires_grad_())
                  .is_contiguous(kChannelsLast));
}

// What a block returns may be overwritten by the next one.
TEST(Squeeze, ReturnsMemoryOfItsOwnWhereABlockIsOnePixel) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({1, 4, 1, 1});
  const torch::Tensor y = memcnn::Squeeze(2)->inverse(x);
  EXPECT_NE(y.data_ptr(), x.data_ptr());
  EXPECT_NE(memcnn::Squeeze(2)(y).data_ptr(), y.data_ptr());
}

TEST(Squeeze, RejectsSizesThatAreNoMultiples) {
  EXPECT_THAT(
      [] {
        memcnn::Squeeze({1, 2, 2})(torch::ones({2, 3, 4, 5, 6}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("Squeeze::forward(): expected sizes that are multiples of "
                    "the strides [1, 2, 2] after the channels, but got sizes "
                    "[2, 3, 4, 5, 6]")));
  EXPECT_THAT(
      [] {
        memcnn::Squeeze(2)->inverse(torch::ones({2, 6, 4, 4}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Squeeze::inverse(): expected a multiple of 4 channels, the "
          "entries of a block of strides [2, 2], but got sizes [2, 6, "
          "4, 4]")));
  EXPECT_THAT(
      [] {
        memcnn::Haar()(torch::ones({2, 3, 4, 5}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("Haar::forward(): expected sizes that are multiples of the "
                    "strides [2, 2]")));
}

TEST(Squeeze, RejectsOtherDimensions) {
  EXPECT_THAT(
      [] {
        memcnn::Squeeze(2)(torch::ones({2, 4}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("Squeeze::forward(): expected an input (N, C, *) of 3 to 5 "
                    "dims, but got sizes [2, 4]")));
  EXPECT_THAT(
      [] {
        memcnn::Squeeze({2, 2})(torch::ones({2, 4, 6}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Squeeze::forward(): expected an input (N, C, *) with a dim "
          "for each of the strides [2, 2], but got sizes [2, 4, 6]")));
  EXPECT_THAT(
      [] { memcnn::Squeeze(2)(torch::Tensor()); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Squeeze::forward(): expected a tensor, but got an undefined "
          "one")));
}

TEST(Squeeze, RejectsStridesThatAreNone) {
  for (const auto& strides :
       std::vector<std::vector<int64_t>>{{}, {0}, {2, -1}, {2, 2, 2, 2}}) {
    EXPECT_THAT(
        [&] { memcnn::Squeeze squeeze(strides); },
        ThrowsError<c10::ValueError>(HasSubstr(
            "Squeeze::Squeeze(): expected one to three strides from 1 "
            "on, but got")));
  }
}

TEST(Haar, TakesSumsAndDifferences) {
  const torch::Tensor x =
      torch::tensor({1.f, 2.f, 3.f, 4.f}).view({1, 1, 2, 2});
  const torch::Tensor expected =
      torch::tensor({5.f, -1.f, -2.f, 0.f}).view({1, 4, 1, 1});
  EXPECT_TRUE(memcnn::Haar()(x).equal(expected));
  EXPECT_TRUE(memcnn::Haar()->inverse(expected).equal(x));

  const torch::Tensor ones = memcnn::Haar()(torch::ones({1, 1, 2, 2, 2}));
  EXPECT_NEAR(ones[0][0].item<float>(), 2.828427, 1e-6);
  EXPECT_LT(ones.narrow(1, 1, 7).norm().item<float>(), 1e-6);

  const torch::Tensor pair =
      memcnn::Haar()(torch::tensor({{{3., 1.}}}, torch::kDouble));
  EXPECT_NEAR(pair[0][0].item<double>(), 4 / std::sqrt(2), 1e-15);
  EXPECT_NEAR(pair[0][1].item<double>(), 2 / std::sqrt(2), 1e-15);
}

TEST(Haar, KeepsLengthsAndTheOrderOfChannels) {
  torch::manual_seed(1);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {2, 3, 8}, {2, 3, 8, 4}, {2, 3, 4, 8, 6}}) {
    const torch::Tensor x = torch::randn(sizes, torch::kDouble);
    const torch::Tensor y = memcnn::Haar()(x);
    EXPECT_NEAR((y.norm() / x.norm()).item<double>(), 1, kRoundTripFloat64);
    // Channel c becomes those from k c on.
    const int64_t k = y.size(1) / x.size(1);
    EXPECT_TRUE(memcnn::Haar()(x.narrow(1, 1, 1)).equal(y.narrow(1, k, k)));
  }
}

TEST(Haar, LeavesItsInputAsItIs) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({2, 4, 4, 4});
  const torch::Tensor copy = x.clone();
  memcnn::Haar haar;
  haar(x);
  haar->inverse(x);
  EXPECT_TRUE(x.equal(copy));
}

} // namespace
} // namespace memcnn_test
