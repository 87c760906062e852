// SPDX-License-Identifier: MIT
//
// What else happens in real training, around and inside saving blocks: each
// works as with plain autograd, or stops with an error that says what to do.

#include "support/autocast.h"
#include "support/modules.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <ATen/autocast_mode.h>

#include <stdexcept>
#include <thread>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

using torch::nn::AnyModule;

constexpr int64_t kChannels = 6;

Branch conv_branch(torch::ScalarType dtype, torch::Device device) {
  return [=] {
    AnyModule branch(ConvBranch(kChannels / 2));
    branch.ptr()->to(device, dtype);
    return branch;
  };
}

torch::Tensor image_leaf(
    torch::ScalarType dtype = torch::kDouble,
    torch::Device device = torch::kCPU) {
  return torch::randn({2, kChannels, 5, 5}).to(device, dtype).requires_grad_();
}

/// One training step of a plain chain and its saving twin under autocast.
void expect_equal_under_autocast(
    Engine engine,
    torch::Device device,
    torch::ScalarType dtype) {
  Chain plain = Chain::make(3, conv_branch(torch::kFloat, device));
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf(torch::kFloat, device);
  const auto loss = [&](auto&& forward) {
    const Autocast autocast(device.type(), dtype);
    return forward(made_by_a_layer(x)).to(torch::kFloat).square().mean();
  };
  const torch::Tensor expected = loss([&](auto&& t) { return plain.plain(t); });
  const torch::Tensor found =
      loss([&](auto&& t) { return saving.run(engine, t); });
  EXPECT_TRUE(found.equal(expected));
  expected.backward();
  found.backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientAutocast);
  EXPECT_TRUE(all_equal(saving.module().buffers(), plain.module().buffers()));
}

class Interaction : public testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  /// Gradients of a loss by input and parameters, of a saving chain.
  std::vector<torch::Tensor> gradients_of(
      Chain& chain,
      const torch::Tensor& x,
      const torch::Tensor& loss) {
    std::vector<torch::Tensor> sources = chain.parameters();
    sources.push_back(x);
    return torch::autograd::grad(
        {loss}, sources, {}, std::nullopt, false, /*allow_unused=*/true);
  }

  Chain chain_ = Chain::make(3, conv_branch(torch::kDouble, torch::kCPU));
};

INSTANTIATE_TEST_SUITE_P(Engines, Interaction, all_engines(), engine_name);

TEST_P(Interaction, AutocastToBFloat16) {
  expect_equal_under_autocast(GetParam(), torch::kCPU, torch::kBFloat16);
}

TEST_P(Interaction, FrozenParameters) {
  Chain twin = chain_.twin();
  for (Chain* chain : {&chain_, &twin}) {
    for (torch::Tensor& parameter : chain->block(1)->f.ptr()->parameters()) {
      parameter.set_requires_grad(false);
    }
  }
  const torch::Tensor x = image_leaf();
  chain_.plain(made_by_a_layer(x)).square().sum().backward();
  twin.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  EXPECT_LT(
      relative_error(twin.gradients(), chain_.gradients()), kGradientFloat64);
  EXPECT_FALSE(twin.block(1)->f.ptr()->parameters()[0].grad().defined());
}

TEST_P(Interaction, AllParametersFrozen) {
  for (torch::Tensor& parameter : chain_.parameters()) {
    parameter.set_requires_grad(false);
  }
  const torch::Tensor x = image_leaf();
  const auto expected = torch::autograd::grad(
      {chain_.plain(made_by_a_layer(x)).square().sum()}, {x});
  const auto found = torch::autograd::grad(
      {chain_.run(GetParam(), made_by_a_layer(x)).square().sum()}, {x});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_P(Interaction, InputThatNeedsNoGradient) {
  Chain twin = chain_.twin();
  const torch::Tensor x = image_leaf().detach();
  const torch::Tensor values = x.clone();
  chain_.plain(x).square().sum().backward();
  twin.run(GetParam(), x).square().sum().backward();
  EXPECT_LT(
      relative_error(twin.gradients(), chain_.gradients()), kGradientFloat64);
  EXPECT_TRUE(x.equal(values));
}

TEST_P(Interaction, ParameterSharedByBothBranches) {
  // One module as F and G, and one parameter inside two modules.
  torch::nn::Linear shared(4, 4);
  shared->to(torch::kDouble);
  torch::nn::Sequential f(shared, torch::nn::Tanh());
  torch::nn::Sequential g(shared, torch::nn::Sigmoid());
  memcnn::AdditiveCoupling modules(shared, shared);
  memcnn::AdditiveCoupling parameters(f, g);
  const torch::Tensor x = leaf({3, 8});

  const auto check = [&](auto& coupling) {
    memcnn::ReversibleSequence sequence(
        memcnn::ReversibleSequenceOptions(), coupling);
    memcnn::InvertibleModuleWrapper wrapper(coupling);
    const torch::Tensor input = x * 2;
    const torch::Tensor y =
        GetParam() == Engine::kSequence ? sequence(input) : wrapper(input);
    const auto expected = torch::autograd::grad(
        {coupling(x * 2).square().sum()}, {shared->weight, shared->bias, x});
    const auto found = torch::autograd::grad(
        {y.square().sum()}, {shared->weight, shared->bias, x});
    EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  };
  check(modules);
  check(parameters);
  EXPECT_EQ(modules->parameters().size(), 2u) << "listed once, stepped once";
}

TEST_P(Interaction, BlockUsedTwiceInOneGraph) {
  Chain twin = chain_.twin();
  const torch::Tensor x = image_leaf();
  const auto expected = gradients_of(
      chain_, x, chain_.plain(chain_.plain(made_by_a_layer(x))).square().sum());
  const auto found = gradients_of(
      twin,
      x,
      twin.run(GetParam(), twin.run(GetParam(), made_by_a_layer(x)))
          .square()
          .sum());
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  EXPECT_TRUE(all_equal(twin.module().buffers(), chain_.module().buffers()));
}

TEST_P(Interaction, OutputThatIsNotUsed) {
  const torch::Tensor x = image_leaf();
  const torch::Tensor unused = chain_.run(GetParam(), x * 2);
  const torch::Tensor used = chain_.run(GetParam(), x * 3);
  used.sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST_P(Interaction, PartOfAnOutputThatIsNotUsed) {
  Chain twin = chain_.twin();
  const torch::Tensor x = image_leaf();
  const auto part = [](const torch::Tensor& y) {
    return y.narrow(/*dim=*/1, /*start=*/0, /*length=*/2).square().sum();
  };
  const auto expected =
      gradients_of(chain_, x, part(chain_.plain(made_by_a_layer(x))));
  const auto found =
      gradients_of(twin, x, part(twin.run(GetParam(), made_by_a_layer(x))));
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_P(Interaction, ExceptionInForwardKeepsItsMessage) {
  Chain chain({Coupling(AnyModule(Throwing(4, 0)), AnyModule(Throwing(4, 1)))});
  const torch::Tensor x = leaf({3, 8}, torch::kFloat);
  EXPECT_THAT(
      [&] { chain.run(GetParam(), x * 2); },
      ThrowsMessage<std::domain_error>(HasSubstr("the branch gave up")));
  chain.run(GetParam(), x * 2).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST_P(Interaction, ExceptionInBackwardKeepsItsMessage) {
  Chain chain({Coupling(AnyModule(Throwing(4, 2)), AnyModule(Throwing(4, 0)))});
  const torch::Tensor x = leaf({3, 8}, torch::kFloat);
  const torch::Tensor y = chain.run(GetParam(), x * 2);
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsMessage<std::exception>(HasSubstr("the branch gave up")));
  chain.run(GetParam(), x * 2).sum().backward();
  EXPECT_TRUE(x.grad().defined());
}

TEST_P(Interaction, TwoThreadsTrainTwoModels) {
  Chain first = chain_.twin();
  Chain second = chain_.twin();
  const torch::Tensor x = image_leaf();
  chain_.plain(made_by_a_layer(x)).square().sum().backward();
  const auto train = [&](Chain& chain) {
    for (int step = 0; step < 20; ++step) {
      chain.module().zero_grad();
      chain.run(GetParam(), x.detach() * 1).square().sum().backward();
    }
  };
  std::thread other([&] { train(first); });
  train(second);
  other.join();
  for (Chain* chain : {&first, &second}) {
    EXPECT_LT(
        relative_error(chain->gradients(), chain_.gradients()),
        kGradientFloat64);
  }
}

TEST_P(Interaction, ResidualConnectionAroundABlock) {
  Chain twin = chain_.twin();
  const torch::Tensor x = image_leaf();
  // Read before the block, the input is safe with either engine; read after
  // it, a wrapper's input is gone and says so.
  const torch::Tensor input = made_by_a_layer(x);
  const torch::Tensor skip = input.sin();
  const torch::Tensor found = twin.run(GetParam(), input) + skip;
  const torch::Tensor plain_input = made_by_a_layer(x);
  const torch::Tensor expected = chain_.plain(plain_input) + plain_input.sin();
  EXPECT_LT(
      relative_error(
          gradients_of(twin, x, found.square().sum()),
          gradients_of(chain_, x, expected.square().sum())),
      kGradientFloat64);

  const torch::Tensor again = made_by_a_layer(x);
  const torch::Tensor y = twin.run(GetParam(), again);
  if (GetParam() == Engine::kWrapper) {
    EXPECT_THAT(
        [&] { y + again; },
        ThrowsError<c10::Error>(HasSubstr("keep_input(true)")));
  } else {
    EXPECT_NO_THROW(y + again);
  }
}

TEST_P(Interaction, InPlaceReluBeforeABlock) {
  Chain twin = chain_.twin();
  const torch::Tensor x = image_leaf();
  const auto expected =
      gradients_of(chain_, x, chain_.plain((x * 2).relu_()).square().sum());
  const auto found = gradients_of(
      twin, x, twin.run(GetParam(), (x * 2).relu_()).square().sum());
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_P(Interaction, InPlaceOperationOnAnOutputIsAnError) {
  const torch::Tensor y = chain_.run(GetParam(), image_leaf() * 2);
  y.relu_();
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("modified in place"), HasSubstr("out-of-place form")));
}

TEST_P(Interaction, BranchThatWorksInPlaceOnItsArgumentIsAnError) {
  Chain chain({Coupling(
      AnyModule(torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true))),
      AnyModule(torch::nn::Tanh()))});
  EXPECT_THAT(
      [&] { chain.run(GetParam(), image_leaf() * 2); },
      ThrowsError<c10::Error>(
          HasSubstr("expected F to leave its argument as it is"),
          HasSubstr("not in place")));
}

TEST_P(Interaction, ParameterAddedToAHalfAsItIs) {
  // Its gradient is that of the half, which is then updated in place.
  struct OffsetImpl : torch::nn::Cloneable<OffsetImpl> {
    OffsetImpl() {
      reset();
    }
    void reset() override {
      offset = register_parameter(
          "offset", torch::randn({1, 3, 5, 5}, torch::kDouble));
    }
    torch::Tensor forward(torch::Tensor x) {
      return torch::tanh(x) + offset;
    }
    torch::Tensor offset;
  };
  Chain plain =
      Chain::make(2, [] { return AnyModule(std::make_shared<OffsetImpl>()); });
  Chain saving = plain.twin();
  const torch::Tensor x = leaf({1, kChannels, 5, 5});
  plain.plain(made_by_a_layer(x)).pow(3).sum().backward();
  saving.run(GetParam(), made_by_a_layer(x)).pow(3).sum().backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
}

TEST_P(Interaction, InferenceMode) {
  const c10::InferenceMode inference;
  const torch::Tensor x = torch::randn({2, kChannels, 5, 5}, torch::kDouble);
  EXPECT_TRUE(chain_.run(GetParam(), x).equal(chain_.plain(x)));
}

TEST_P(Interaction, FailedBackwardCannotBeRepeated) {
  Chain chain({Coupling(AnyModule(Throwing(4, 2)), AnyModule(Throwing(4, 0)))});
  const torch::Tensor y =
      chain.run(GetParam(), leaf({3, 8}, torch::kFloat) * 2);
  EXPECT_THROW(y.sum().backward(), std::exception);
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("expected one backward pass"),
          HasSubstr("retain_graph = true")));
}

TEST_P(Interaction, BlocksInsideBlocks) {
  // A branch that is a wrapped coupling itself.
  const auto make_inner = [] {
    memcnn::AdditiveCoupling inner(
        torch::nn::AnyModule(SmoothBranch(2)),
        torch::nn::AnyModule(SmoothBranch(2)));
    inner->to(torch::kDouble);
    return inner;
  };
  auto f = make_inner();
  auto g = make_inner();
  memcnn::InvertibleModuleWrapper f_saving(f);
  memcnn::InvertibleModuleWrapper g_saving(g);
  memcnn::AdditiveCoupling plain(f, g);
  Chain chain({Coupling(AnyModule(f_saving), AnyModule(g_saving))});
  const torch::Tensor x = leaf({2, 8, 4, 4});
  const auto expected = torch::autograd::grad(
      {plain(x * 2).square().sum()}, {x, f->parameters()[0]});
  const auto found = torch::autograd::grad(
      {chain.run(GetParam(), x * 2).square().sum()}, {x, f->parameters()[0]});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_P(Interaction, DepthTwentyInFloat64AndFloat32) {
  Chain plain = Chain::make(20, conv_branch(torch::kDouble, torch::kCPU));
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  plain.plain(made_by_a_layer(x)).square().sum().backward();
  saving.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);

  // In float32 inversion may at most double what rounding costs anyway.
  Chain narrow_plain = plain.twin();
  Chain narrow = plain.twin();
  const torch::Tensor x_narrow = x.detach().to(torch::kFloat).requires_grad_();
  for (Chain* chain : {&narrow_plain, &narrow}) {
    chain->module().to(torch::kFloat);
  }
  narrow_plain.plain(made_by_a_layer(x_narrow)).square().sum().backward();
  narrow.run(GetParam(), made_by_a_layer(x_narrow)).square().sum().backward();
  const double rounding =
      relative_error(narrow_plain.gradients(), plain.gradients());
  const double saved = relative_error(narrow.gradients(), plain.gradients());
  EXPECT_LT(saved, 2 * rounding + kGradientFloat32);
}

// The same where a CUDA device is present.

class InteractionCuda : public testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
    torch::manual_seed(1);
  }
};

INSTANTIATE_TEST_SUITE_P(Engines, InteractionCuda, all_engines(), engine_name);

TEST_P(InteractionCuda, AutocastToFloat16) {
  expect_equal_under_autocast(GetParam(), {torch::kCUDA, 0}, torch::kHalf);
}

TEST_P(InteractionCuda, AutocastToBFloat16) {
  expect_equal_under_autocast(GetParam(), {torch::kCUDA, 0}, torch::kBFloat16);
}

TEST_P(InteractionCuda, GradientsAndBuffersMatchPlainAutograd) {
  const torch::Device device(torch::kCUDA, 0);
  Chain plain = Chain::make(5, conv_branch(torch::kDouble, device));
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf(torch::kDouble, device);
  plain.plain(made_by_a_layer(x)).square().sum().backward();
  saving.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
  EXPECT_TRUE(all_equal(saving.module().buffers(), plain.module().buffers()));
}

TEST_P(InteractionCuda, ReplaysTheRandomNumbersOfTheDevice) {
  const torch::Device device(torch::kCUDA, 0);
  Chain plain = Chain::make(3, [&] {
    AnyModule branch(DropoutBranch(kChannels / 2));
    branch.ptr()->to(device, torch::kDouble);
    return branch;
  });
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf(torch::kDouble, device);
  torch::manual_seed(7);
  plain.plain(made_by_a_layer(x)).square().sum().backward();
  torch::manual_seed(7);
  saving.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
}

} // namespace
} // namespace memcnn_test
