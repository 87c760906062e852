// SPDX-License-Identifier: MIT

#include "glow/glow.h"
#include <memcnn/memcnn.h>
#include "support/throws_error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

using glow::GlowOptions;
using memcnn_test::ThrowsError;
using testing::HasSubstr;

// --- bits -------------------------------------------------------------------

/// Of one value by a flow that changes nothing and a standard normal prior.
double bits_of(double value, int64_t bits = 8) {
  glow::Prior prior(1);
  prior->to(torch::kFloat64);
  const auto z = torch::full({1, 1, 1, 1}, value, torch::kFloat64);
  return glow::bits_per_dim(prior->log_prob(z), /*values=*/1, bits)
      .item<double>();
}

TEST(BitsPerDim, HasTheValuesOfAStandardNormal) {
  EXPECT_NEAR(bits_of((0 + 0.5) / 256 - 0.5), 9.504679, 1e-6);
  double sum = 0;
  for (int64_t pixel = 0; pixel < 256; ++pixel) {
    sum += bits_of((static_cast<double>(pixel) + 0.5) / 256 - 0.5);
  }
  EXPECT_NEAR(sum / 256, 9.385860, 2e-6); // of all noise: log2 e / 24 more
}

TEST(BitsPerDim, CountsTheBitsThatAreLearned) {
  EXPECT_NEAR(bits_of(0.25, 8) - bits_of(0.25, 5), 3, 1e-12);
}

TEST(BitsPerDim, IsAMeanOverTheValuesOfEachImage) {
  const auto bits = glow::bits_per_dim(
      torch::tensor({-12 * std::log(2.0), 0.0}, torch::kFloat64), 12);
  EXPECT_NEAR(bits[0].item<double>(), 9, 1e-12);
  EXPECT_NEAR(bits[1].item<double>(), 8, 1e-12);
}

torch::Tensor all_bytes() {
  return torch::arange(256).to(torch::kUInt8).view({1, 1, 16, 16});
}

TEST(Dequantise, IsUndoneByQuantise) {
  torch::manual_seed(1);
  const auto bytes = all_bytes();
  const auto input = glow::dequantise(bytes);
  EXPECT_EQ(input.scalar_type(), torch::kFloat32);
  EXPECT_TRUE(torch::equal(glow::quantise(input), bytes));
  const auto coarse = glow::quantise(glow::dequantise(bytes, 5), 5);
  EXPECT_TRUE(torch::equal(coarse, bytes.bitwise_and(0xf8)));
}

TEST(Dequantise, FillsEachLevelEvenly) {
  const auto bytes = torch::full({1, 1, 100, 100}, 64, torch::kUInt8);
  torch::manual_seed(2);
  const auto input = glow::dequantise(bytes, 5).to(torch::kFloat64);
  const double least = 64.0 / 256 - 0.5;
  EXPECT_GE(input.min().item<double>(), least - 1e-7);
  EXPECT_LE(input.max().item<double>(), least + 1.0 / 32 + 1e-7);
  EXPECT_NEAR(input.mean().item<double>(), least + 0.5 / 32, 5e-4);
}

TEST(Quantise, KeepsWhatIsTooLargeInRange) {
  const auto bytes = glow::quantise(torch::tensor({-9.0, 9.0}));
  EXPECT_TRUE(torch::equal(bytes, torch::tensor({0, 255}, torch::kUInt8)));
}

// --- the model --------------------------------------------------------------

GlowOptions tiny() {
  return GlowOptions().image_size(4).levels(2).steps(2).width(5);
}

/// In float64, with parameters that are nowhere at their start.
glow::Glow trained_like(const GlowOptions& options) {
  torch::manual_seed(3);
  glow::Glow model(options);
  model->to(torch::kFloat64);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) {
    parameter.add_(torch::randn_like(parameter), 0.1);
  }
  return model;
}

torch::Tensor images(int64_t count, int64_t size) {
  torch::manual_seed(4);
  return torch::rand({count, 3, size, size}, torch::kFloat64) - 0.5;
}

TEST(Glow, LogProbIsThatOfAChangeOfVariables) {
  auto model = trained_like(tiny());
  const auto x = images(1, 4).requires_grad_();
  std::vector<torch::Tensor> values;
  torch::Tensor expected = torch::zeros({1}, torch::kFloat64);
  const auto z = model->flow->forward(x);
  for (size_t i = 0; i < z.size(); ++i) {
    values.push_back(z[i].flatten());
    const auto scale = model->priors[i]->log_scale.exp();
    const auto normal = (z[i] - model->priors[i]->mean) / scale;
    expected = expected -
        (0.5 * normal.square() + scale.log() + 0.5 * std::log(2 * M_PI)).sum();
  }
  const auto all = torch::cat(values);
  std::vector<torch::Tensor> rows;
  for (int64_t i = 0; i < all.numel(); ++i) {
    rows.push_back(
        torch::autograd::grad({all[i]}, {x}, {}, /*retain_graph=*/true)[0]
            .flatten());
  }
  expected = expected + std::get<1>(torch::slogdet(torch::stack(rows)));
  EXPECT_NEAR(model->log_prob(x).item<double>(), expected.item<double>(), 1e-9);
}

std::vector<torch::Tensor> gradients_of(glow::Glow& model) {
  const auto x = images(3, 8).requires_grad_();
  auto inputs = model->parameters();
  inputs.push_back(x);
  const auto weights = torch::tensor({1.0, 10.0, -3.0}, torch::kFloat64);
  return torch::autograd::grad({(model->log_prob(x) * weights).sum()}, inputs);
}

TEST(Glow, GradientsMatchPlainAutograd) {
  auto model = trained_like(tiny().image_size(8).steps(5).anchor_every(2));
  const auto found = gradients_of(model);
  const memcnn::PlainAutogradGuard plain;
  const auto expected = gradients_of(model);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(torch::allclose(found[i], expected[i], 1e-8, 1e-8)) << i;
  }
}

TEST(Glow, StartsFromDataByInitialize) {
  torch::manual_seed(5);
  glow::Glow model(tiny());
  const auto batch = 3 * torch::randn({16, 3, 4, 4}) + 1;
  EXPECT_EQ(memcnn::initialize(model->flow, batch), 4U);
  const auto z = model->flow->forward(batch).back();
  EXPECT_LT(z.abs().mean().item<double>(), 2);
}

TEST(Glow, SamplesImagesOfItsSize) {
  auto model = trained_like(tiny());
  const auto generator = at::detail::createCPUGenerator(6);
  model->to(torch::kFloat32);
  const auto drawn = model->sample(5, 0.7, generator);
  EXPECT_EQ(drawn.sizes(), torch::IntArrayRef({5, 3, 4, 4}));
  EXPECT_FALSE(drawn.requires_grad());
}

TEST(Glow, SamplesTheMeanWhereItIsCold) {
  auto model = trained_like(tiny());
  model->to(torch::kFloat32);
  const auto cold = model->sample(2, /*temperature=*/0);
  EXPECT_TRUE(torch::allclose(cold[0], cold[1]));
  EXPECT_FALSE(torch::allclose(model->sample(1, 1)[0], cold[0], 1e-3, 1e-3));
}

TEST(Glow, TellsHowFarARoundTripIsOff) {
  auto model = trained_like(tiny());
  const auto exact = glow::round_trip(model, images(2, 4));
  EXPECT_LT(exact.error, 1e-10);
  ASSERT_EQ(exact.drift.size(), 2U);
  EXPECT_LT(exact.drift[1], 1e-10);
  model->to(torch::kFloat32);
  const auto rounded =
      glow::round_trip(model, images(2, 4).to(torch::kFloat32));
  EXPECT_LT(rounded.error, 1e-3);
  EXPECT_GT(rounded.drift[0], exact.drift[0]);
}

int64_t held_by(const GlowOptions& options) {
  torch::manual_seed(7);
  glow::Glow model(options);
  const auto x = torch::rand({4, 3, 8, 8}) - 0.5;
  const memcnn::AllocationMeter meter;
  const auto loss = model->log_prob(x).sum();
  return meter.held_bytes();
}

TEST(Glow, HoldsNoMoreWithMoreSteps) {
  const auto sized = [](int64_t steps) {
    return tiny().image_size(8).anchor_every(0).steps(steps);
  };
  const int64_t stream = 4 * 3 * 8 * 8 * 4; // bytes
  EXPECT_LT(held_by(sized(24)) - held_by(sized(4)), stream);
  const memcnn::PlainAutogradGuard plain;
  EXPECT_GT(held_by(sized(24)), 10 * stream);
}

TEST(Glow, HasTheParametersOfThePublishedOne) {
  int64_t count = 0;
  for (const auto& parameter : glow::Glow(GlowOptions())->parameters()) {
    count += parameter.numel();
  }
  EXPECT_EQ(count, 43951236); // as examples/glow/README.md says
}

TEST(Glow, ClonesDeeply) {
  auto model = trained_like(tiny());
  const auto x = images(2, 4);
  const auto before = model->log_prob(x);
  glow::Glow copy(std::dynamic_pointer_cast<glow::GlowImpl>(model->clone()));
  EXPECT_TRUE(torch::equal(copy->log_prob(x), before));
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) {
      parameter.add_(0.1);
    }
  }
  EXPECT_TRUE(torch::equal(model->log_prob(x), before));
}

TEST(Glow, PrintsItsOptions) {
  EXPECT_THAT(
      c10::str(*glow::Glow(tiny())),
      testing::StartsWith(
          "glow::Glow(image_size=4, levels=2, steps=2, width=5, "
          "anchor_every=8)"));
}

TEST(Glow, RejectsSizesThatDoNotHalve) {
  EXPECT_THAT(
      [] { glow::Glow model(tiny().image_size(6)); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Glow::Glow(): expected an image_size divisible by 2 for each level, "
          "but got image_size=6, levels=2, ")));
  EXPECT_THAT(
      [] { glow::Glow model(tiny().steps(0)); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "Glow::Glow(): expected at least one level, step and channel, but "
          "got image_size=4, levels=2, steps=0, ")));
}

} // namespace
