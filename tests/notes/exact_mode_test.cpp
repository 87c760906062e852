// SPDX-License-Identifier: MIT
//
// Note [Exact mode], rule by rule.

#include "../support/modules.h"
#include "../support/pretended_capture.h"
#include "../support/throws_error.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

using torch::nn::AnyModule;

/// What a RevNet's branch is made of.
AnyModule deep_branch() {
  struct DeepImpl : torch::nn::Cloneable<DeepImpl> {
    DeepImpl() {
      reset();
    }
    void reset() override {
      const auto convolution = [] {
        return torch::nn::Conv2d(
            torch::nn::Conv2dOptions(4, 4, 3).padding(1).bias(false));
      };
      layers = register_module(
          "layers",
          torch::nn::Sequential(
              torch::nn::BatchNorm2d(4),
              torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true)),
              convolution(),
              torch::nn::BatchNorm2d(4),
              torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true)),
              convolution()));
    }
    torch::Tensor forward(torch::Tensor x) {
      return layers->forward(x);
    }
    torch::nn::Sequential layers{nullptr};
  };
  return AnyModule(std::make_shared<DeepImpl>());
}

Chain exact_chain(
    size_t depth,
    std::optional<int64_t> bits,
    const Branch& branch = deep_branch) {
  std::vector<Coupling> blocks;
  for (size_t i = 0; i < depth; ++i) {
    blocks.emplace_back(
        branch(), branch(), memcnn::CouplingOptions().fractional_bits(bits));
  }
  return Chain(std::move(blocks));
}

class ExactMode : public testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

INSTANTIATE_TEST_SUITE_P(Engines, ExactMode, all_engines(), engine_name);

// Rule 1: sums of multiples of 2^-k are exact, so that reconstruction is.

TEST_P(ExactMode, Rule1InverseRecoversTheRoundedInputBitForBitAtDepth200) {
  Chain chain = exact_chain(200, 16);
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({2, 8, 6, 6});
  const torch::Tensor rounded = (x * 65536).round() / 65536;
  const torch::Tensor y = chain.run(GetParam(), x);
  EXPECT_TRUE(chain.inverse(GetParam(), y).equal(rounded));
}

TEST_P(ExactMode, Rule1GradientsEqualPlainOnesBitForBitAtDepth200) {
  for (const int64_t bits : {16, 12}) {
    Chain plain = exact_chain(200, bits);
    Chain saving = plain.twin();
    const torch::Tensor x = leaf({4, 8, 8, 8}, torch::kFloat);
    const torch::Tensor x_twin = x.detach().clone().requires_grad_();
    const torch::Tensor expected =
        plain.plain(made_by_a_layer(x)).square().mean();
    const torch::Tensor found =
        saving.run(GetParam(), made_by_a_layer(x_twin)).square().mean();
    EXPECT_TRUE(found.equal(expected));
    expected.backward();
    found.backward();
    EXPECT_TRUE(x_twin.grad().equal(x.grad()));
    EXPECT_TRUE(all_equal(saving.gradients(), plain.gradients()));
  }
}

TEST_P(ExactMode, Rule1GradientsEqualPlainOnesBitForBitInChannelsLast) {
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  Chain plain = exact_chain(20, 16);
  for (const torch::Tensor& parameter : plain.parameters()) {
    if (parameter.dim() == 4) {
      parameter.set_data(parameter.detach().contiguous(kChannelsLast));
    }
  }
  Chain saving = plain.twin();
  const torch::Tensor x = leaf({4, 8, 8, 8}, torch::kFloat);
  const torch::Tensor x_twin = x.detach().clone().requires_grad_();
  const auto image = [](const torch::Tensor& leaf) {
    return made_by_a_layer(leaf).contiguous(kChannelsLast);
  };
  plain.plain(image(x)).square().mean().backward();
  saving.run(GetParam(), image(x_twin)).square().mean().backward();
  EXPECT_TRUE(x_twin.grad().equal(x.grad()));
  EXPECT_TRUE(all_equal(saving.gradients(), plain.gradients()));
}

TEST_P(ExactMode, Rule1WhatMadeTheInputGetsTheSameGradientInChannelsLast) {
  // Batch normalisation adds in another order where its gradient has another
  // layout.
  constexpr auto kChannelsLast = torch::MemoryFormat::ChannelsLast;
  Chain plain = exact_chain(3, 16);
  Chain saving = plain.twin();
  const torch::Tensor x =
      torch::randn({8, 8, 16, 16}).contiguous(kChannelsLast);
  torch::nn::BatchNorm2d producer(8);
  const auto gradients = [&](const auto& run) {
    producer->zero_grad();
    const torch::Tensor image = producer(x);
    image.register_hook([](const torch::Tensor& gradient) {
      EXPECT_TRUE(gradient.is_contiguous(kChannelsLast));
    });
    // Weights of the loss: batch normalisation sees nothing of a plain sum.
    const torch::Tensor y = run(image);
    (y * torch::linspace(-1, 1, y.numel()).view_as(y)).sum().backward();
    return std::vector<torch::Tensor>{
        producer->weight.grad().clone(), producer->bias.grad().clone()};
  };
  const auto expected =
      gradients([&](const torch::Tensor& image) { return plain.plain(image); });
  const auto found = gradients([&](const torch::Tensor& image) {
    return saving.run(GetParam(), image);
  });
  EXPECT_TRUE(all_equal(found, expected));
}

TEST_P(ExactMode, Rule1TwinsTrainToIdenticalParameters) {
  Chain plain = exact_chain(10, 14);
  Chain saving = plain.twin();
  torch::optim::SGD plain_optimizer(
      plain.parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  torch::optim::SGD optimizer(
      saving.parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  for (int step = 0; step < 100; ++step) {
    const torch::Tensor x = torch::randn({4, 8, 6, 6}).requires_grad_();
    plain_optimizer.zero_grad();
    plain.plain(made_by_a_layer(x)).square().mean().backward();
    plain_optimizer.step();
    optimizer.zero_grad();
    saving.run(GetParam(), made_by_a_layer(x)).square().mean().backward();
    optimizer.step();
  }
  EXPECT_TRUE(all_equal(saving.parameters(), plain.parameters()));
  EXPECT_TRUE(all_equal(saving.module().buffers(), plain.module().buffers()));
}

TEST_P(ExactMode, Rule1HoldsForEveryBudget) {
  Chain plain = exact_chain(6, 16);
  Chain saving = plain.twin();
  const torch::Tensor x = leaf({2, 8, 6, 6}, torch::kFloat);
  plain.plain(made_by_a_layer(x)).square().mean().backward();
  auto& sequence =
      dynamic_cast<memcnn::ReversibleSequenceImpl&>(saving.module());
  for (const int64_t budget : {0, 60'000, 120'000, 100'000'000}) {
    sequence.options.memory_budget(budget);
    for (int step = 0; step < 2; ++step) {
      saving.module().zero_grad();
      saving.run(Engine::kSequence, made_by_a_layer(x))
          .square()
          .mean()
          .backward();
      EXPECT_TRUE(all_equal(saving.gradients(), plain.gradients())) << budget;
    }
  }
}

// Rule 2: gradients pass rounding straight through.

TEST_P(ExactMode, Rule2GradientIsThatOfTheNetworkWithoutRounding) {
  // With linear branches rounding changes values, and no gradient.
  const Branch linear = [] {
    AnyModule branch(torch::nn::Linear(4, 4));
    branch.ptr()->to(torch::kDouble);
    return branch;
  };
  Chain exact = exact_chain(3, 4, linear);
  std::vector<Coupling> blocks;
  for (size_t i = 0; i < 3; ++i) {
    blocks.emplace_back(exact.block(i)->f, exact.block(i)->g);
  }
  Chain smooth(std::move(blocks));
  const torch::Tensor x = leaf({3, 8});
  const torch::Tensor weights = torch::randn({3, 8}, torch::kDouble);
  const auto expected = torch::autograd::grad(
      {(smooth.plain(made_by_a_layer(x)) * weights).sum()}, {x});
  const auto found = torch::autograd::grad(
      {(exact.run(GetParam(), made_by_a_layer(x)) * weights).sum()}, {x});
  EXPECT_LT(relative_error(found, expected), 1e-14);
  const torch::Tensor y = exact.run(GetParam(), made_by_a_layer(x)) * 16;
  EXPECT_TRUE(y.equal(y.round()));
}

// Rule 3: the range depends on the dtype, and leaving it is an error.

TEST_P(ExactMode, Rule3OverflowOfTheRangeIsAnError) {
  for (const auto& [dtype, digits] :
       std::vector<std::pair<torch::ScalarType, int64_t>>{
           {torch::kFloat, 24},
           {torch::kDouble, 53},
           {torch::kHalf, 11},
           {torch::kBFloat16, 8}}) {
    const int64_t bits = digits - 4; // exact below 16
    Chain chain = exact_chain(1, bits, [] {
      return AnyModule(
          torch::nn::Functional([](const torch::Tensor& x) { return x * 1; }));
    });
    const auto run = [&, type = dtype](double value) {
      chain.run(
          GetParam(), torch::full({2, 4}, value, type).requires_grad_() * 1);
    };
    EXPECT_NO_THROW(run(4.0)) << dtype; // x + x, x + (x + x): 12
    EXPECT_THAT(
        [&] { run(6.0); },
        ThrowsError<c10::ValueError>(
            HasSubstr(
                "AdditiveCoupling::forward(): expected values below 2^4 = 16"),
            HasSubstr("but got 18"),
            HasSubstr("Set fewer fractional_bits, or normalise the values.")))
        << dtype;
    EXPECT_THAT(
        [&] { run(-20.0); },
        ThrowsError<c10::ValueError>(HasSubstr("but got 20")))
        << dtype;
  }
}

TEST_P(ExactMode, Rule3BitsBeyondTheDtypeAreAnError) {
  Chain chain = exact_chain(1, 24);
  EXPECT_THAT(
      [&] {
        chain.run(GetParam(), leaf({2, 8, 6, 6}, torch::kFloat) * 1);
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected fractional_bits below 24, the digits of Float, "
                    "but got 24")));
  for (const int64_t bits : {-1, 53}) {
    EXPECT_THAT(
        [&] { exact_chain(1, bits); },
        ThrowsError<c10::ValueError>(
            HasSubstr("AdditiveCoupling::AdditiveCoupling(): expected "
                      "fractional_bits from 0 to 52")));
  }
}

// The same where a device notes it: the CPU is told to do as others do.

/// One exact coupling, whose run takes x to 3 x at most, in multiples of 2^-bits.
class NotedRange : public testing::TestWithParam<torch::ScalarType> {
 protected:
  void SetUp() override {
    memcnn::detail::cpu_notes_ranges() = true;
  }
  void TearDown() override {
    try {
      memcnn::check_exact_range(torch::kCPU); // nothing for the next test
    } catch (const c10::Error&) {
    }
    memcnn::detail::cpu_notes_ranges() = false;
  }

  torch::Tensor run(double value) {
    return coupling_(torch::full({2, 4}, value, GetParam()));
  }

  static auto tells(double value) {
    return ThrowsError<c10::ValueError>(
        HasSubstr("AdditiveCoupling::forward(): expected values below 2^4 = "
                  "16, where fractional_bits("),
        HasSubstr(c10::str("but got ", value, " (in an earlier call on cpu).")),
        HasSubstr("Set fewer fractional_bits, or normalise the values."));
  }

 private:
  static torch::nn::Functional same() {
    return torch::nn::Functional([](const torch::Tensor& x) { return x * 1; });
  }

  memcnn::AdditiveCoupling<torch::nn::Functional, torch::nn::Functional>
      coupling_{
          same(),
          same(),
          memcnn::CouplingOptions().fractional_bits(
              memcnn::detail::digits_of(GetParam()) - 4)}; // exact below 16
};

INSTANTIATE_TEST_SUITE_P(
    Dtypes,
    NotedRange,
    testing::Values(
        torch::kFloat,
        torch::kDouble,
        torch::kHalf,
        torch::kBFloat16));

TEST_P(NotedRange, Rule3OverflowIsToldByWhoAsks) {
  EXPECT_NO_THROW(run(4.0));
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCPU));
  EXPECT_NO_THROW(run(6.0));
  EXPECT_NO_THROW(run(-20.0)); // the largest counts
  EXPECT_THAT([] { memcnn::check_exact_range(torch::kCPU); }, tells(60));
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCPU)); // told once
}

TEST_P(NotedRange, Rule3OverflowIsToldByALaterCall) {
  run(6.0);
  EXPECT_NO_THROW(run(1.0)); // has the device send what it noted
  EXPECT_THAT([&] { run(1.0); }, tells(18));
  EXPECT_NO_THROW(run(1.0));
  EXPECT_NO_THROW(run(1.0));
}

TEST_P(NotedRange, Rule3WhatIsNotANumberHidesNoOverflow) {
  run(std::numeric_limits<double>::quiet_NaN());
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCPU));
  run(6.0);
  run(std::numeric_limits<double>::quiet_NaN());
  EXPECT_THAT([] { memcnn::check_exact_range(torch::kCPU); }, tells(18));
}

TEST_P(NotedRange, Rule3ACaptureNotesAndTellsNothing) {
  run(6.0); // takes the flag
  run(1.0);
  {
    const PretendedCapture capture(3);
    EXPECT_NO_THROW(run(7.0));
    EXPECT_THAT(
        [] { memcnn::check_exact_range(torch::kCPU); },
        ThrowsError<c10::Error>(
            HasSubstr("check_exact_range(): expected to run eagerly, since it "
                      "waits for the device, but got capture 3 of cpu.")));
  }
  EXPECT_THAT([&] { run(1.0); }, tells(21));
}

TEST(NotedRangeInACapture, Rule3NeedsARunBefore) {
  memcnn::detail::cpu_notes_ranges() = true;
  const PretendedCapture capture(3);
  memcnn::AdditiveCoupling coupling(
      torch::nn::Linear(2, 2),
      torch::nn::Linear(2, 2),
      memcnn::CouplingOptions().fractional_bits(9));
  EXPECT_THAT(
      [&] {
        coupling(torch::ones({2, 4}));
      },
      ThrowsError<c10::Error>(
          HasSubstr("AdditiveCoupling::forward(): expected an eager run with "
                    "the same fractional_bits and dtype before it is captured, "
                    "but got the first one in capture 3 of cpu."),
          HasSubstr("Run whole steps before the capture.")));
  memcnn::detail::cpu_notes_ranges() = false;
}

// And where a device does so by itself.

TEST(NotedRangeCuda, Rule3OverflowIsToldByALaterCallAndByWhoAsks) {
  if (!torch::cuda::is_available()) {
    GTEST_SKIP() << "no CUDA device";
  }
  memcnn::AdditiveCoupling coupling(
      torch::nn::Linear(2, 2),
      torch::nn::Linear(2, 2),
      memcnn::CouplingOptions().fractional_bits(20)); // exact below 16
  coupling->to(torch::kCUDA);
  const auto run = [&](double value) {
    coupling(torch::full({2, 4}, value, torch::kCUDA));
    torch::cuda::synchronize(); // what the device noted is there
  };
  const auto told = ThrowsError<c10::ValueError>(
      HasSubstr("AdditiveCoupling::forward(): expected values below 2^4 = 16"),
      HasSubstr("(in an earlier call on cuda:0)."));
  run(1);
  run(100);
  run(1); // has the device send what it noted
  EXPECT_THAT([&] { run(1); }, told);
  EXPECT_NO_THROW(run(1));
  run(100);
  EXPECT_THAT([] { memcnn::check_exact_range(torch::kCUDA); }, told);
  EXPECT_NO_THROW(memcnn::check_exact_range({torch::kCUDA, 0}));
}

TEST(CheckExactRange, Rule3AsksNothingOfTheCpu) {
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCPU));
}

// Rule 4: refused where it cannot hold.

TEST(ExactModeRefusal, Rule4AffineCouplingRefuses) {
  const auto make = [] {
    memcnn::AffineCoupling coupling(
        memcnn::AffineAdapterSigmoid(WideBranch(2)),
        memcnn::AffineAdapterSigmoid(WideBranch(2)),
        memcnn::CouplingOptions().fractional_bits(16));
  };
  EXPECT_THAT(
      make,
      ThrowsError<c10::ValueError>(
          HasSubstr(
              "AffineCoupling::AffineCoupling(): expected no fractional_bits"),
          HasSubstr("Use AdditiveCoupling for an exact mode.")));
}

TEST(ExactModeRefusal, PrintsItsBits) {
  memcnn::AdditiveCoupling coupling(
      SmoothBranch(2),
      SmoothBranch(2),
      memcnn::CouplingOptions().fractional_bits(12));
  EXPECT_THAT(
      c10::str(coupling),
      HasSubstr("memcnn::AdditiveCoupling(split_dim=1, fractional_bits=12)"));
}

} // namespace
} // namespace memcnn_test
