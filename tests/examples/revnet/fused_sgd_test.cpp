// SPDX-License-Identifier: MIT

#include "revnet/fused_sgd.h"

#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace {

using memcnn_test::relative_error;
using memcnn_test::ThrowsError;
using revnet::FusedSgd;
using testing::HasSubstr;
using testing::StartsWith;
using testing::StrEq;
using torch::Tensor;
using torch::optim::SGDOptions;
using Tensors = std::vector<Tensor>;

/// Weights of two convolutions, the first in channels-last order, and a bias.
Tensors make_parameters(const torch::TensorOptions& options) {
  torch::manual_seed(1);
  Tensors parameters{
      torch::randn({6, 4, 3, 3}, options)
          .contiguous(torch::MemoryFormat::ChannelsLast),
      torch::randn({5, 6, 1, 1}, options),
      torch::randn({5}, options)};
  for (Tensor& parameter : parameters) {
    parameter.requires_grad_();
  }
  return parameters;
}

/// Gives every parameter a gradient, the same ones for the same seed.
void draw_gradients(const Tensors& parameters, int seed) {
  torch::manual_seed(seed);
  for (const Tensor& parameter : parameters) {
    parameter.mutable_grad() = torch::randn_like(parameter.detach());
  }
}

void expect_the_numbers_of_torch(
    const SGDOptions& options,
    const torch::TensorOptions& kind,
    double tolerance) {
  const Tensors expected = make_parameters(kind);
  const Tensors found = make_parameters(kind);
  torch::optim::SGD torch_sgd(expected, options);
  FusedSgd fused(found, options);
  for (int i = 0; i < 20; ++i) {
    const double lr = 0.1 / (i + 1);
    torch_sgd.param_groups()[0].options().set_lr(lr);
    fused.set_lr(lr);
    draw_gradients(expected, i);
    draw_gradients(found, i);
    torch_sgd.step();
    fused.step();
  }
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_LT(relative_error(found[i], expected[i]), tolerance) << i;
  }
}

std::vector<SGDOptions> kinds_of_sgd() {
  return {
      SGDOptions(0.1),
      SGDOptions(0.1).weight_decay(0.01),
      SGDOptions(0.1).momentum(0.9).weight_decay(0.01),
      SGDOptions(0.1).momentum(0.9).weight_decay(0.01).nesterov(true)};
}

TEST(FusedSgd, HasTheNumbersOfTorchSgd) {
  for (const SGDOptions& options : kinds_of_sgd()) {
    expect_the_numbers_of_torch(
        options, torch::kFloat64, memcnn_test::kFusedUpdateFloat64);
    expect_the_numbers_of_torch(
        options, torch::kFloat32, memcnn_test::kFusedUpdateFloat32);
  }
}

TEST(FusedSgd, LeavesParametersWithoutAGradient) {
  const Tensors parameters = make_parameters(torch::kFloat32);
  const Tensor before = parameters[1].detach().clone();
  FusedSgd optimizer(parameters, SGDOptions(0.1).momentum(0.9).weight_decay(1));
  draw_gradients(parameters, 2);
  parameters[1].mutable_grad().reset();
  const Tensor other = parameters[2].detach().clone();
  optimizer.step();
  EXPECT_TRUE(torch::equal(parameters[1], before));
  EXPECT_FALSE(torch::equal(parameters[2], other));
  optimizer.zero_grad();
  optimizer.step(); // none has one
}

TEST(FusedSgd, SetsGradientsToNone) {
  const Tensors parameters = make_parameters(torch::kFloat32);
  FusedSgd optimizer(parameters, 0.1);
  draw_gradients(parameters, 2);
  optimizer.zero_grad();
  for (const Tensor& parameter : parameters) {
    EXPECT_FALSE(parameter.grad().defined());
  }
}

TEST(FusedSgd, ChangesNothingIfALossIsNotFinite) {
  const Tensors parameters = make_parameters(torch::kFloat32);
  FusedSgd optimizer(parameters, SGDOptions(0.1).momentum(0.9));
  draw_gradients(parameters, 2);
  const Tensor before = parameters[0].detach().clone();
  const auto infinite = torch::full({}, std::numeric_limits<float>::infinity());
  optimizer.step(revnet::not_finite(infinite));
  EXPECT_TRUE(torch::equal(parameters[0], before));
  EXPECT_EQ(optimizer.momentum_buffers()[0].abs().max().item<double>(), 0);
  optimizer.step(revnet::not_finite(torch::ones({})));
  EXPECT_FALSE(torch::equal(parameters[0], before));
}

TEST(FusedSgd, TakesGradientsOfAnotherLayout) {
  const Tensors expected = make_parameters(torch::kFloat64);
  const Tensors found = make_parameters(torch::kFloat64);
  FusedSgd same(expected, SGDOptions(0.1).momentum(0.9));
  FusedSgd other(found, SGDOptions(0.1).momentum(0.9));
  for (int i = 0; i < 3; ++i) {
    draw_gradients(expected, i);
    for (size_t j = 0; j < found.size(); ++j) {
      found[j].mutable_grad() = expected[j].grad().contiguous();
    }
    same.step();
    other.step();
  }
  ASSERT_NE(found[0].grad().strides(), found[0].strides());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(torch::equal(found[i], expected[i])) << i;
  }
}

TEST(FusedSgd, CopiesNoGradientOfAOneByOneKernel) {
  const auto weight = torch::randn({5, 6, 1, 1});
  const auto gradient =
      torch::randn({5, 6, 1, 1})
          .as_strided({5, 6, 1, 1}, {6, 1, 6, 6}); // as channels-last has it
  const auto laid_out = revnet::detail::laid_out_as(weight, gradient);
  EXPECT_EQ(laid_out.strides(), weight.strides());
  EXPECT_EQ(laid_out.data_ptr(), gradient.data_ptr());
  EXPECT_TRUE(torch::equal(laid_out, gradient));
}

TEST(FusedSgd, GoesOnFromMomentumBuffers) {
  const auto options = SGDOptions(0.1).momentum(0.9);
  const Tensors expected = make_parameters(torch::kFloat32);
  FusedSgd first(expected, options);
  draw_gradients(expected, 2);
  first.step();

  Tensors found;
  for (const Tensor& parameter : expected) {
    found.push_back(parameter.detach().clone().requires_grad_());
  }
  FusedSgd second(found, options);
  const void* place = second.momentum_buffers()[0].data_ptr();
  second.set_momentum_buffers(first.momentum_buffers());
  EXPECT_EQ(second.momentum_buffers()[0].data_ptr(), place);
  draw_gradients(expected, 3);
  draw_gradients(found, 3);
  first.step();
  second.step();
  EXPECT_TRUE(torch::equal(found[0], expected[0]));
}

TEST(FusedSgd, KeepsNoBuffersWithoutMomentum) {
  FusedSgd optimizer(make_parameters(torch::kFloat32), 0.1);
  EXPECT_TRUE(optimizer.momentum_buffers().empty());
  EXPECT_THAT(
      [&] { optimizer.set_momentum_buffers({torch::ones({1})}); },
      ThrowsError<c10::ValueError>(
          StrEq("FusedSgd::set_momentum_buffers(): expected 0 buffers, but got "
                "1.")));
}

TEST(FusedSgd, RejectsBuffersOfOtherSizesBeforeItTakesAny) {
  const auto options = SGDOptions(0.1).momentum(0.9);
  FusedSgd optimizer({torch::ones({2}), torch::ones({2, 3})}, options);
  EXPECT_THAT(
      [&] {
        optimizer.set_momentum_buffers({torch::ones({2}), torch::ones({1})});
      },
      ThrowsError<c10::ValueError>(
          StrEq("FusedSgd::set_momentum_buffers(): expected buffer 1 of sizes "
                "[2, 3], but got [1].")));
  EXPECT_EQ(optimizer.momentum_buffers()[0].sum().item<double>(), 0);
}

TEST(FusedSgd, RejectsALearningRateThatIsNone) {
  FusedSgd optimizer(make_parameters(torch::kFloat32), 0.1);
  for (const double lr : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_THAT(
        [&] { optimizer.set_lr(lr); },
        ThrowsError<c10::ValueError>(
            StartsWith("FusedSgd::set_lr(): expected a learning rate of 0 or "
                       "more, but got ")));
    EXPECT_EQ(optimizer.lr(), 0.1);
  }
}

TEST(FusedSgd, RejectsOptions) {
  for (const SGDOptions& options :
       {SGDOptions(-1),
        SGDOptions(0.1).momentum(-0.9),
        SGDOptions(0.1).weight_decay(-1),
        SGDOptions(0.1).momentum(0.9).dampening(0.1),
        SGDOptions(0.1).nesterov(true)}) {
    EXPECT_THAT(
        [&] { FusedSgd(make_parameters(torch::kFloat32), options); },
        ThrowsError<c10::ValueError>(StartsWith(
            "FusedSgd::FusedSgd(): expected lr, momentum and weight_decay to "
            "be 0 or more, no dampening, and nesterov with momentum alone, but "
            "got lr=")));
  }
}

TEST(FusedSgd, RejectsParameters) {
  EXPECT_THAT(
      [] { FusedSgd({}, 0.1); },
      ThrowsError<c10::ValueError>(
          StrEq("FusedSgd::FusedSgd(): expected one parameter or more, but got "
                "none.")));
  const auto parameter = torch::ones({2, 3});
  const auto expect_rejected = [&](const Tensor& second,
                                   const std::string& description) {
    EXPECT_THAT(
        ([&] {
          FusedSgd({parameter, second}, 0.1);
        }),
        ThrowsError<c10::ValueError>(StrEq(
            "FusedSgd::FusedSgd(): expected distinct, dense parameters of one "
            "floating point dtype on one device, but got parameter 1 of sizes "
            "[2, 3] and strides " +
            description + ", after float on cpu.")));
  };
  expect_rejected(parameter, "[3, 1], float on cpu");
  expect_rejected(torch::ones({2, 3}, torch::kDouble), "[3, 1], double on cpu");
  const auto count = torch::ones({2}, torch::kInt64);
  EXPECT_THAT(
      [&] { FusedSgd({count}, 0.1); },
      ThrowsError<c10::ValueError>(HasSubstr("but got parameter 0 of sizes [2] "
                                             "and strides [1], long int")));
  expect_rejected(torch::ones({2, 3}, torch::kMeta), "[3, 1], float on meta");
  expect_rejected(torch::ones({2, 6}).slice(1, 0, 3), "[6, 1], float on cpu");
}

TEST(NotFinite, IsOneWhereAnyValueIsNot) {
  const double infinity = std::numeric_limits<double>::infinity();
  const auto of = [](double value) {
    const auto found = revnet::not_finite(torch::tensor({1.0, value}));
    EXPECT_EQ(found.dtype(), torch::kFloat32);
    EXPECT_EQ(found.dim(), 0);
    return found.item<double>();
  };
  EXPECT_EQ(of(2), 0);
  EXPECT_EQ(of(infinity), 1);
  EXPECT_EQ(of(-infinity), 1);
  EXPECT_EQ(of(std::numeric_limits<double>::quiet_NaN()), 1);
}

TEST(FusedSgdCuda, RejectsParametersThatMovedSince) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  torch::nn::Linear layer(2, 3);
  FusedSgd optimizer(layer->parameters(), 0.1);
  layer->to(torch::Device(torch::kCUDA, 0));
  EXPECT_THAT(
      [&] { optimizer.step(); },
      ThrowsError<c10::Error>(
          StrEq("FusedSgd::step(): expected parameters on cpu as they were for "
                "the constructor, but got them on cuda:0. Move the module "
                "before its optimiser is made.")));
}

TEST(FusedSgdCuda, HasTheNumbersOfTorchSgd) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  for (const SGDOptions& options : kinds_of_sgd()) {
    expect_the_numbers_of_torch(
        options, torch::kCUDA, memcnn_test::kFusedUpdateFloat32);
  }
}

} // namespace
