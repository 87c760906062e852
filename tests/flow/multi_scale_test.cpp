// SPDX-License-Identifier: MIT

#include "../support/flow_modules.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <memory>
#include <sstream>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using torch::Tensor;

auto coupling(int64_t channels) {
  return memcnn::AffineCoupling(
      memcnn::AffineAdapterTanh(WideBranch(channels / 2)));
}

/// 8 channels, of which 4, then 2, go on.
memcnn::MultiScale make_flow(torch::ScalarType dtype = torch::kDouble) {
  torch::manual_seed(2);
  memcnn::MultiScale flow(
      memcnn::ReversibleSequence(coupling(8), coupling(8)),
      memcnn::ReversibleSequence(coupling(4), Scaled(4)),
      coupling(2)); // a level may be one block
  flow->to(dtype);
  return flow;
}

TEST(MultiScale, FactorsOutHalfOfEachLevel) {
  memcnn::MultiScale flow = make_flow(torch::kFloat);
  const Tensor x = torch::randn({2, 8, 3, 3});
  const std::vector<Tensor> z = flow->forward(x);
  ASSERT_EQ(z.size(), 3);
  EXPECT_EQ(z[0].sizes(), at::IntArrayRef({2, 4, 3, 3}));
  EXPECT_EQ(z[1].sizes(), at::IntArrayRef({2, 2, 3, 3}));
  EXPECT_EQ(z[2].sizes(), at::IntArrayRef({2, 2, 3, 3}));
  EXPECT_LT(relative_error(flow->inverse(z), x), 1e-5);
}

TEST(MultiScale, LogDetIsThatOfTheLevelsOneByOne) {
  memcnn::MultiScale flow = make_flow();
  const Tensor x = torch::randn({2, 8, 3, 3}, torch::kDouble);
  const memcnn::Latents latents = flow->forward_with_log_det(x);
  Tensor h = x;
  Tensor sum = torch::zeros({2}, torch::kDouble);
  for (size_t i = 0; i < 3; ++i) {
    const auto [y, log_det] = flow->level(i)->forward_with_log_det(h);
    sum += log_det;
    h = y.narrow(1, 0, y.size(1) / 2);
    const Tensor latent =
        i == 2 ? y : y.narrow(1, y.size(1) / 2, y.size(1) / 2);
    EXPECT_LT(relative_error(latents.z[i], latent), kGradientFloat64);
  }
  EXPECT_LT(relative_error(latents.log_det, sum), kGradientFloat64);
  const auto [again, minus] = flow->inverse_with_log_det(latents.z);
  EXPECT_LT(relative_error(again, x), kGradientFloat64);
  EXPECT_LT(relative_error(minus, -latents.log_det), kGradientFloat64);
}

TEST(MultiScale, LogDetIsThatOfTheJacobian) {
  memcnn::MultiScale flow = make_flow();
  const Tensor x = torch::randn({2, 8, 2, 2}, torch::kDouble);
  const Tensor expected = log_det_of_jacobian(
      [&](const Tensor& at) {
        const std::vector<Tensor> z = flow->forward(at);
        return torch::cat(
            {z[0].flatten(1), z[1].flatten(1), z[2].flatten(1)}, 1);
      },
      x);
  EXPECT_LT(
      relative_error(flow->forward_with_log_det(x).log_det, expected),
      kGradientFloat64);
}

/// Runs all levels with ordinary autograd, or not.
void run_plainly(memcnn::MultiScale& flow, bool plain) {
  for (size_t i = 0; i < flow->size(); ++i) {
    flow->level(i)->options.disable(plain);
  }
}

TEST(MultiScale, GradientsEqualPlainAutograd) {
  memcnn::MultiScale flow = make_flow();
  const Tensor weights = torch::tensor({1.0, 10.0}, torch::kDouble);
  const auto forward = [&](bool plain) {
    run_plainly(flow, plain);
    torch::manual_seed(3);
    const Tensor x = leaf({2, 8, 3, 3});
    const auto [z, log_det] = flow->forward_with_log_det(x);
    Tensor loss = (log_det * weights).sum();
    for (const Tensor& latent : z) {
      loss = loss + (latent * torch::randn_like(latent)).sum();
    }
    std::vector<Tensor> leaves = flow->parameters();
    leaves.push_back(x);
    return torch::autograd::grad({loss}, leaves);
  };
  EXPECT_LT(relative_error(forward(false), forward(true)), kGradientFloat64);
  const auto inverse = [&](bool plain) {
    run_plainly(flow, plain);
    torch::manual_seed(3);
    const std::vector<Tensor> z = {
        leaf({2, 4, 3, 3}), leaf({2, 2, 3, 3}), leaf({2, 2, 3, 3})};
    const auto [x, log_det] = flow->inverse_with_log_det(z);
    std::vector<Tensor> leaves = flow->parameters();
    leaves.insert(leaves.end(), z.begin(), z.end());
    return torch::autograd::grad(
        {(x * torch::randn_like(x)).sum() + (log_det * weights).sum()}, leaves);
  };
  EXPECT_LT(relative_error(inverse(false), inverse(true)), kGradientFloat64);
}

TEST(MultiScale, GivesEachLevelItsConditions) {
  torch::manual_seed(4);
  memcnn::MultiScale flow;
  flow->push_back(memcnn::AffineCoupling(
      memcnn::AffineAdapterTanh{ConditionalBranch(2, 2, 4)}));
  flow->push_back(
      memcnn::AffineCoupling(
          memcnn::AffineAdapterTanh{ConditionalBranch(1, 3, 2)}),
      {1});
  const Tensor x = torch::randn({2, 4, 3, 3});
  const Tensor c = torch::randn({2, 2, 3, 3});
  const Tensor c2 = torch::randn({2, 3, 3, 3});
  const auto given = flow->given({c, c2});
  const auto [z, log_det] = given.forward_with_log_det(x);
  EXPECT_LT(relative_error(given.inverse(z), x), 1e-5);
  EXPECT_LT(
      relative_error(given.inverse_with_log_det(z).log_det, -log_det), 1e-4);
  EXPECT_TRUE(given.forward(x)[1].equal(z[1]));
  EXPECT_THAT(
      [&] { flow->given({c}).forward(x); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "MultiScale::forward(): expected 2 conditions for all levels, but "
          "got 1")));
  auto copy = std::dynamic_pointer_cast<memcnn::MultiScaleImpl>(flow->clone());
  EXPECT_TRUE(copy->given({c, c2}).forward(x)[1].equal(z[1]));
}

TEST(MultiScale, HoldsLessThanTwoInputs) {
  const auto held = [](int depth) {
    memcnn::MultiScale flow;
    for (const int64_t channels : {8, 4, 2}) {
      memcnn::ReversibleSequence level;
      for (int i = 0; i < depth; ++i) {
        level->push_back(coupling(channels));
      }
      flow->push_back(level);
    }
    const Tensor x = torch::randn({4, 8, 16, 16});
    const memcnn::AllocationMeter meter;
    const auto latents = flow->forward_with_log_det(x);
    return static_cast<double>(meter.held_bytes()) /
        static_cast<double>(x.nbytes());
  };
  EXPECT_LT(held(2), 2);
  EXPECT_DOUBLE_EQ(held(12), held(2));
}

TEST(MultiScale, NamesLatentsThatDoNotFit) {
  memcnn::MultiScale flow = make_flow(torch::kFloat);
  const Tensor x = torch::randn({2, 8, 3, 3});
  std::vector<Tensor> z = flow->forward(x);
  z[1] = torch::randn({2, 2, 3, 4});
  EXPECT_THAT(
      [&] { flow->inverse(z); },
      ThrowsError<c10::ValueError>(
          HasSubstr("MultiScale::inverse(): expected a latent 1 of sizes "
                    "[2, 2, 3, 3]"),
          HasSubstr("[2, 2, 3, 4]")));
  z[1] = torch::randn({2, 3, 3, 3});
  EXPECT_THAT(
      [&] { flow->inverse(z); },
      ThrowsError<c10::ValueError>(HasSubstr("a latent 1 of sizes")));
  z[1] = Tensor();
  EXPECT_THAT(
      [&] { flow->inverse(z); },
      ThrowsError<c10::ValueError>(HasSubstr("undefined")));
  z.pop_back();
  EXPECT_THAT(
      [&] { flow->inverse(z); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "MultiScale::inverse(): expected 3 latents, one a level, but got "
          "2")));
}

TEST(MultiScale, NamesTheLastLatentWhereThatMayBeWrong) {
  memcnn::MultiScale flow(
      memcnn::Squeeze(2), memcnn::Squeeze(2), memcnn::Squeeze({2, 1}));
  const std::vector<Tensor> z = flow->forward(torch::randn({2, 3, 16, 8}));
  const auto inverse_with_last = [&](const std::vector<int64_t>& sizes) {
    std::vector<Tensor> latents = z;
    latents.back() = torch::randn(sizes);
    return [&flow, latents] {
      flow->inverse(latents);
    };
  };
  ASSERT_EQ(z[1].sizes(), at::IntArrayRef({2, 12, 4, 2}));
  ASSERT_EQ(z[2].sizes(), at::IntArrayRef({2, 24, 2, 2}));
  EXPECT_THAT(
      inverse_with_last({2, 24, 1, 4}),
      ThrowsError<c10::ValueError>(HasSubstr(
          "MultiScale::inverse(): expected a latent 1 of sizes [2, 12, 2, 4], "
          "as the other half that level 2 returned, or a latent 2 of sizes "
          "[2, 24, 2, 2] beside this one, but got sizes [2, 12, 4, 2], Float, "
          "cpu and sizes [2, 24, 1, 4], Float, cpu. Draw latents")));
  EXPECT_THAT(
      inverse_with_last({3, 12, 2, 2}),
      ThrowsError<c10::ValueError>(
          HasSubstr("or a latent 2 of sizes [2, 24, 2, 2] beside this one"),
          HasSubstr("and sizes [3, 12, 2, 2]")));
  EXPECT_THAT(
      inverse_with_last({2, 24, 0, 2}),
      ThrowsError<c10::ValueError>(
          HasSubstr("returned, or another latent 2, but got")));
}

TEST(MultiScale, NamesLevelsThatFail) {
  EXPECT_THAT(
      [] {
        memcnn::MultiScale()->forward(torch::randn({2, 8, 3, 3}));
      },
      ThrowsError<c10::Error>(HasSubstr(
          "MultiScale::forward(): expected at least one level, but got none")));
  memcnn::MultiScale flow{Flipped(), Silent()};
  EXPECT_THAT(
      [&] {
        flow->forward(torch::randn({2, 1, 3, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "MultiScale::forward(): expected at least 2 channels after level "
          "0")));
  EXPECT_THAT(
      [&] {
        flow->forward_with_log_det(torch::randn({2, 8, 3, 3}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("MultiScale::forward(): level 1"),
          HasSubstr("SilentImpl")));
  EXPECT_THAT(
      [&] { flow->level(2); },
      ThrowsError<c10::IndexError>(HasSubstr(
          "MultiScale::level(): expected an index below the number of levels, 2")));
}

TEST(MultiScale, IsAModule) {
  memcnn::MultiScale flow = make_flow(torch::kFloat);
  const Tensor x = torch::randn({2, 8, 3, 3});
  const std::vector<Tensor> z = flow->forward(x);
  auto copy = std::dynamic_pointer_cast<memcnn::MultiScaleImpl>(flow->clone());
  EXPECT_TRUE(copy->forward(x)[2].equal(z[2]));
  {
    const torch::NoGradGuard no_grad;
    for (Tensor& parameter : copy->parameters()) {
      parameter.zero_();
    }
  }
  EXPECT_TRUE(flow->forward(x)[2].equal(z[2])) << "the copy is not deep";

  std::stringstream file;
  torch::save(flow, file);
  memcnn::MultiScale loaded = make_flow(torch::kFloat);
  {
    const torch::NoGradGuard no_grad;
    loaded->parameters()[0].zero_();
  }
  torch::load(loaded, file);
  EXPECT_TRUE(loaded->forward(x)[2].equal(z[2]));
  EXPECT_EQ(
      flow->named_children().keys(), (std::vector<std::string>{"0", "1", "2"}));
  std::ostringstream stream;
  stream << flow;
  EXPECT_THAT(stream.str(), HasSubstr("memcnn::MultiScale"));
  torch::nn::AnyModule any(flow);
  EXPECT_TRUE(any.forward<std::vector<Tensor>>(x)[2].equal(z[2]));
}

TEST(MultiScale, ALevelUsedTwiceIsOneChild) {
  memcnn::ReversibleSequence level(memcnn::Squeeze(2), memcnn::ActNorm(4));
  memcnn::MultiScale flow(level, level); // 2 channels of a signal, both times
  EXPECT_EQ(flow->parameters().size(), level->parameters().size());
  auto copy = std::dynamic_pointer_cast<memcnn::MultiScaleImpl>(flow->clone());
  EXPECT_EQ(copy->level(0).ptr(), copy->level(1).ptr());
  EXPECT_NE(copy->level(0).ptr(), level.ptr());
}

} // namespace
} // namespace memcnn_test
