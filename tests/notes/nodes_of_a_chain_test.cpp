// SPDX-License-Identifier: MIT
//
// Note [Nodes of a chain], and rule 11 of Note [Recomputation].

#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function_hook.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;

using torch::nn::AnyModule;

constexpr int64_t kSize = 4; // of a half

/// Calls a function once a gradient has been accumulated.
class AfterGradient final : public torch::autograd::PostAccumulateGradHook {
 public:
  using Call = std::function<void(const torch::Tensor&)>;

  explicit AfterGradient(Call call) : call_(std::move(call)) {}
  void operator()(const torch::autograd::Variable& parameter) override {
    call_(parameter);
  }

 private:
  Call call_;
};

void after_gradient(
    const torch::Tensor& parameter,
    const AfterGradient::Call& call) {
  torch::autograd::impl::set_post_acc_grad_hooks(
      parameter, std::make_unique<AfterGradient>(call));
}

/// A sequence of couplings that notes which of its branches run: 2 k is F of
/// block k, 2 k + 1 its G.
struct Probed {
  explicit Probed(int depth) {
    torch::manual_seed(3);
    for (int k = 0; k < depth; ++k) {
      const auto branch = [&](int number) {
        AnyModule linear(ProbedLinear(
            kSize, [this, number](const auto&) { runs.push_back(number); }));
        linear.ptr()->to(torch::kDouble);
        return linear;
      };
      AnyModule f = branch(2 * k);
      AnyModule g = branch(2 * k + 1);
      blocks.emplace_back(std::move(f), std::move(g));
      sequence->push_back(blocks.back());
    }
  }

  torch::Tensor run(bool input_needs_gradient = true) {
    const torch::Tensor x = torch::randn({2, 2 * kSize}, torch::kDouble)
                                .requires_grad_(input_needs_gradient);
    torch::Tensor y = sequence->forward(x);
    runs.clear();
    return y;
  }

  void freeze(int first, int count) {
    for (int k = first; k < first + count; ++k) {
      for (torch::Tensor& parameter : blocks[k]->parameters()) {
        parameter.requires_grad_(false);
      }
    }
  }

  std::vector<int> runs;
  std::vector<Coupling> blocks;
  memcnn::ReversibleSequence sequence{memcnn::ReversibleSequenceOptions()};
};

/// The numbers of blocks of which branches ran.
std::vector<int> blocks_of(const std::vector<int>& runs) {
  std::vector<int> blocks;
  for (const int run : runs) {
    if (blocks.empty() || blocks.back() != run / 2) {
      blocks.push_back(run / 2);
    }
  }
  return blocks;
}

TEST(NodesOfAChain, Rule2GradientsOfABlockArriveBeforeTheNextOneRuns) {
  Probed net(6);
  std::vector<size_t> runs_before; // of blocks, from the last one back
  for (int k = 0; k < 6; ++k) {
    for (const torch::Tensor& parameter : net.blocks[k]->parameters()) {
      after_gradient(parameter, [&net, &runs_before](const auto& p) {
        EXPECT_TRUE(p.grad().defined());
        runs_before.push_back(net.runs.size());
      });
    }
  }
  net.run().square().sum().backward();
  // Four parameters each: the weights and biases of F and G.
  std::vector<size_t> expected;
  for (size_t block = 1; block <= 6; ++block) {
    expected.insert(expected.end(), 4, 2 * block);
  }
  EXPECT_EQ(runs_before, expected);
}

TEST(NodesOfAChain, Rule2HooksOfAParameterOfSeveralBlocksFireOnceOnTheSum) {
  torch::manual_seed(4);
  const AnyModule shared(torch::nn::Linear(kSize, kSize));
  shared.ptr()->to(torch::kDouble);
  Chain saving = Chain::make(3, [&] { return shared; });
  const torch::Tensor weight = shared.ptr()->parameters()[0];
  int fired = 0;
  int accumulated = 0;
  weight.register_hook([&](const torch::Tensor&) { ++fired; });
  after_gradient(weight, [&](const auto&) { ++accumulated; });

  const torch::Tensor x = leaf({2, 2 * kSize});
  saving.run(Engine::kSequence, x).square().sum().backward();
  EXPECT_EQ(fired, 1);
  EXPECT_EQ(accumulated, 1);
  const torch::Tensor gradient = weight.grad().clone();
  saving.module().zero_grad();
  saving.plain(x).square().sum().backward();
  EXPECT_LT(relative_error(gradient, weight.grad()), kGradientFloat64);
}

TEST(NodesOfAChain, Rule2AnOptimiserMayStepInBackward) {
  torch::manual_seed(5);
  const auto branch = [] {
    AnyModule linear(torch::nn::Linear(kSize, kSize));
    linear.ptr()->to(torch::kDouble);
    return linear;
  };
  Chain after = Chain::make(5, branch);
  Chain within = after.twin();
  for (const torch::Tensor& parameter : within.parameters()) {
    after_gradient(parameter, [](torch::Tensor p) {
      const torch::NoGradGuard no_grad;
      p.sub_(0.001 * p.grad());
      p.mutable_grad().reset();
    });
  }
  for (int step = 0; step < 3; ++step) {
    const torch::Tensor x = leaf({2, 2 * kSize});
    after.run(Engine::kSequence, x).square().sum().backward();
    within.run(Engine::kSequence, x).square().sum().backward();
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& p : after.module().parameters()) {
      p.sub_(0.001 * p.grad());
    }
    after.module().zero_grad();
  }
  const auto expected = after.parameters();
  const auto found = within.parameters();
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(found[i].equal(expected[i])) << i;
  }
}

TEST(NodesOfAChain, Rule3APassRunsOnlyTheBlocksThatItNeeds) {
  Probed net(10);
  const torch::Tensor loss = net.run().square().sum();
  torch::autograd::grad({loss}, {net.blocks[8]->parameters()[0]});
  EXPECT_THAT(blocks_of(net.runs), ElementsAre(9, 8));
  EXPECT_EQ(net.runs.size(), 4);
}

TEST(NodesOfAChain, Rule3AFrozenBeginningIsNotRecordedAndDoesNotRunAgain) {
  for (const int64_t budget : {int64_t{0}, int64_t{100'000}}) {
    Probed net(10);
    Probed whole(10);
    net.sequence->options.memory_budget(budget);
    net.freeze(0, 6);
    for (int step = 0; step < 3; ++step) {
      torch::manual_seed(8);
      const torch::Tensor y = net.run(/*input_needs_gradient=*/false);
      {
        const torch::NoGradGuard no_grad; // nobody needs it again
        net.blocks[5]->parameters()[0].add_(0);
      }
      y.square().sum().backward();
      if (budget == 0) {
        EXPECT_THAT(blocks_of(net.runs), ElementsAre(9, 8, 7, 6));
        EXPECT_EQ(net.runs.size(), 8);
      }
      EXPECT_EQ(net.sequence->kept().blocks, budget == 0 ? 0 : 4);
    }
    torch::manual_seed(8);
    whole.run(/*input_needs_gradient=*/false).square().sum().backward();
    for (int k = 6; k < 10; ++k) {
      const auto found = net.blocks[k]->parameters();
      const auto expected = whole.blocks[k]->parameters();
      for (size_t i = 0; i < found.size(); ++i) {
        EXPECT_LT(
            relative_error(found[i].grad(), 3 * expected[i].grad()),
            kGradientFloat64);
      }
    }
  }
}

TEST(NodesOfAChain, Rule3AnInputThatNobodyAsksForIsLeftAlone) {
  Probed net(4);
  net.freeze(0, 2);
  const torch::Tensor loss = net.run().square().sum();
  std::vector<torch::Tensor> trained;
  for (int k = 2; k < 4; ++k) {
    for (const torch::Tensor& parameter : net.blocks[k]->parameters()) {
      trained.push_back(parameter);
    }
  }
  torch::autograd::grad({loss}, trained);
  EXPECT_THAT(blocks_of(net.runs), ElementsAre(3, 2));
}

/// Multiplies by a tensor that it never registered.
struct SecretImpl final : torch::nn::Cloneable<SecretImpl> {
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return x * secret;
  }
  torch::Tensor secret = torch::ones({1}, torch::kDouble).requires_grad_();
};
TORCH_MODULE(Secret);

TEST(NodesOfAChain, Rule3ATensorThatAFrozenBeginningHidesIsAnError) {
  const Secret secret;
  Chain chain = Chain::make(2, [&] { return AnyModule(secret); });
  Probed net(1);
  memcnn::ReversibleSequence sequence(
      chain.block(0), chain.block(1), net.blocks[0]);
  const torch::Tensor x = torch::randn({2, 2 * kSize}, torch::kDouble);
  EXPECT_THAT(
      [&] { sequence->forward(x); },
      ThrowsError<c10::Error>(HasSubstr("another tensor that requires a")));
  secret->secret.requires_grad_(false);
  sequence->forward(x).sum().backward();
}

TEST(NodesOfAChain, Rule1TwoThreadsMayRunPassesOverOneGraph) {
  Probed net(8);
  const torch::Tensor loss = net.run().square().sum();
  const auto parameters = net.sequence->parameters();
  const auto pass = [&] {
    return torch::autograd::grad(
        {loss}, parameters, /*grad_outputs=*/{}, /*retain_graph=*/true);
  };
  const auto expected = pass();
  std::vector<std::vector<torch::Tensor>> found(4);
  std::vector<std::thread> threads;
  net.runs.reserve(10'000);
  for (auto& gradients : found) {
    threads.emplace_back([&] { gradients = pass(); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const auto& gradients : found) {
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(gradients.at(i).equal(expected[i])) << i;
    }
  }
}

TEST(NodesOfAChain, Rule1APassWithinAPassHasValuesOfItsOwn) {
  Probed net(4);
  const torch::Tensor loss = net.run().square().sum();
  const auto parameters = net.sequence->parameters();
  std::vector<torch::Tensor> within;
  after_gradient(net.blocks[2]->parameters()[0], [&](const auto&) {
    within = torch::autograd::grad(
        {loss}, parameters, /*grad_outputs=*/{}, /*retain_graph=*/true);
  });
  loss.backward({}, /*retain_graph=*/true);
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_TRUE(within.at(i).equal(parameters[i].grad())) << i;
  }
}

TEST(NodesOfAChain, Rule1AHookThatThrowsLeavesARetainedGraphWhole) {
  Probed net(4);
  const torch::Tensor loss = net.run().square().sum();
  bool throws = true;
  after_gradient(net.blocks[2]->parameters()[0], [&](const auto&) {
    TORCH_CHECK(!throws, "the hook gave up");
  });
  EXPECT_THAT(
      [&] { loss.backward({}, /*retain_graph=*/true); },
      ThrowsError<c10::Error>(HasSubstr("the hook gave up")));
  throws = false;
  net.sequence->zero_grad();
  loss.backward();
  EXPECT_TRUE(net.blocks[0]->parameters()[0].grad().defined());
}

TEST(NodesOfAChain, Rule1FailedPassesDoNotAddUp) {
  Probed net(4);
  bool throws = false;
  after_gradient(net.blocks[2]->parameters()[0], [&](const auto&) {
    TORCH_CHECK(!throws, "the hook gave up");
  });
  net.run().sum().backward(); // from here on gradients exist
  const torch::Tensor loss = net.run().sum();
  throws = true;
  const auto pass = [&] {
    loss.backward({}, /*retain_graph=*/true);
  };
  memcnn::AllocationMeter meter;
  // LibTorch's queue keeps what a failed pass left until the next one.
  EXPECT_THROW(pass(), c10::Error);
  const int64_t left = meter.held_bytes();
  EXPECT_THROW(pass(), c10::Error);
  EXPECT_EQ(meter.held_bytes(), left);
}

TEST(NodesOfAChain, Rule1PassesOfSeveralThreadsTakeTurns) {
  // Blocks of several passes would replay one generator at the same time.
  std::atomic<int> inside{0};
  std::atomic<bool> overlapped{false};
  Chain chain = Chain::make(6, [&] {
    AnyModule linear(ProbedLinear(kSize, [&](const auto&) {
      overlapped = overlapped || ++inside > 1;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      --inside;
    }));
    linear.ptr()->to(torch::kDouble);
    return linear;
  });
  const torch::Tensor loss =
      chain.run(Engine::kSequence, leaf({2, 2 * kSize})).square().sum();
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      torch::autograd::grad(
          {loss}, chain.parameters(), {}, /*retain_graph=*/true);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_FALSE(overlapped);
}

/// What a pass of a deep chain takes beyond what is held before it, where
/// gradients exist already: bytes.
int64_t peak_beyond_held(int depth) {
  Probed net(depth);
  net.run().sum().backward();
  memcnn::AllocationMeter meter;
  const torch::Tensor loss = net.run().sum();
  const int64_t held = meter.held_bytes();
  loss.backward();
  return meter.peak_bytes() - held;
}

TEST(NodesOfAChain, Rule2GradientsThatAreAddedToOthersNeverExistTogether) {
  EXPECT_EQ(peak_beyond_held(8), peak_beyond_held(64));
}

/// A coupling of (N, 4, 4, 4) images, smooth.
Coupling smooth_coupling(int64_t split_dim) {
  const int64_t channels = split_dim == 1 ? 2 : 4;
  AnyModule f(SmoothBranch{channels});
  AnyModule g(SmoothBranch{channels});
  Coupling coupling(f, g, memcnn::CouplingOptions().split_dim(split_dim));
  coupling->to(torch::kDouble);
  return coupling;
}

torch::Tensor run_plainly(std::vector<Coupling> blocks, torch::Tensor x) {
  for (Coupling& block : blocks) {
    x = block(x);
  }
  return x;
}

TEST(NodesOfAChain, Rule4SecondDerivativesOfEveryForm) {
  // Halves of two dimensions, and blocks that take one whole tensor.
  torch::manual_seed(6);
  const std::vector<Coupling> blocks = {
      smooth_coupling(1),
      smooth_coupling(1),
      smooth_coupling(2),
      smooth_coupling(-1),
      smooth_coupling(1)};
  memcnn::ReversibleSequence sequence{memcnn::ReversibleSequenceOptions()};
  for (const Coupling& block : blocks) {
    sequence->push_back(block);
  }
  const torch::Tensor x = leaf({2, 4, 4, 4});
  const auto parameters = sequence->parameters();
  const auto second = [&](const torch::Tensor& y) {
    const auto first = torch::autograd::grad(
        {y.square().sum()}, parameters, {}, std::nullopt, true);
    torch::Tensor sum = torch::zeros({}, torch::kDouble);
    for (size_t i = 0; i < first.size(); i += 3) {
      sum = sum + first[i].square().sum();
    }
    std::vector<torch::Tensor> all = parameters;
    all.push_back(x);
    return torch::autograd::grad({sum}, all, {}, std::nullopt, false, true);
  };
  const auto expected = second(run_plainly(blocks, x));
  const auto found = second(sequence->forward(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LT(relative_error(found[i], expected[i]), 1e-9) << i;
  }
}

TEST(NodesOfAChain, Rule4PassesMayEnterInFrontOfAllThatTheFirstRan) {
  torch::manual_seed(7);
  const auto smooth = [] {
    LinearBranch branch(kSize);
    branch->to(torch::kDouble);
    return Coupling(AnyModule(branch), AnyModule(branch));
  };
  const AnyModule tanh{torch::nn::Tanh()};
  // Halves of two dimensions.
  Chain chain(
      {smooth(),
       smooth(),
       Coupling(tanh, tanh, memcnn::CouplingOptions().split_dim(0)),
       smooth()});
  const torch::Tensor x = leaf({4, 2 * kSize});
  const auto parameters = chain.parameters();
  std::vector<torch::Tensor> all = parameters;
  all.push_back(x);
  const auto second = [&](const torch::Tensor& y, const torch::Tensor& of) {
    // The loss is linear: no second pass enters by the output.
    const auto first = torch::autograd::grad(
        {y.sum()}, {of}, {}, std::nullopt, /*create_graph=*/true);
    return torch::autograd::grad(
        {first[0].square().sum()}, all, {}, std::nullopt, false, true);
  };
  for (const torch::Tensor& parameter : {parameters[0], parameters[4]}) {
    const auto expected = second(chain.plain(x), parameter);
    const auto found = second(chain.run(Engine::kSequence, x), parameter);
    EXPECT_LT(relative_error(found, expected), 1e-9);
  }
}

TEST(NodesOfAChain, Rule4TheGradientOfOneHalfMayComeAlone) {
  // Gradients of F's weights depend on the half that F reads, and as G is linear
  // on no other. In front of it the halves are others, or one whole.
  for (const int64_t split_dim : {1, 2}) {
    torch::manual_seed(9);
    Coupling front = smooth_coupling(split_dim);
    AnyModule f(SmoothBranch{4});
    AnyModule g(torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 1)));
    Coupling last(f, g, memcnn::CouplingOptions().split_dim(2));
    last->to(torch::kDouble);
    memcnn::ReversibleSequence sequence(front, last);
    const torch::Tensor x = leaf({2, 4, 4, 4});
    const auto second = [&](const torch::Tensor& y) {
      const torch::Tensor first = torch::autograd::grad(
          {y.sum()}, {f.ptr()->parameters()[0]}, {}, std::nullopt, true)[0];
      return torch::autograd::grad({first.square().sum()}, front->parameters());
    };
    const auto expected = second(run_plainly({front, last}, x));
    const auto found = second(sequence->forward(x));
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_LT(relative_error(found[i], expected[i]), 1e-9) << i;
    }
  }
}

TEST(NodesOfAChain, Rule5InsideOfAWrapperThereIsOneNode) {
  Probed net(3);
  memcnn::InvertibleModuleWrapper wrapper(net.sequence);
  std::vector<size_t> runs_before;
  for (const torch::Tensor& parameter : net.sequence->parameters()) {
    after_gradient(parameter, [&](const auto&) {
      runs_before.push_back(net.runs.size());
    });
  }
  const torch::Tensor y = wrapper(leaf({2, 2 * kSize}));
  net.runs.clear();
  y.sum().backward();
  EXPECT_EQ(runs_before.size(), 12);
  EXPECT_THAT(runs_before, Each(6));
}

struct NothingImpl final : torch::nn::Cloneable<NothingImpl> {
  NothingImpl() {
    reset();
  }
  void reset() override {
    scale = register_parameter("scale", torch::ones({1}));
  }
  torch::Tensor forward(torch::Tensor x) {
    return x * scale;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y / scale;
  }
  torch::Tensor scale;
};
TORCH_MODULE(Nothing);

/// From pixels to numbers, and back to pixels that are off by one.
struct PixelsImpl final : torch::nn::Cloneable<PixelsImpl> {
  PixelsImpl() {
    reset();
  }
  void reset() override {
    scale = register_parameter("scale", torch::full({1}, 0.3, torch::kDouble));
  }
  torch::Tensor forward(torch::Tensor x) {
    return x * scale;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return (y / scale - 1).to(torch::kUInt8);
  }
  torch::Tensor scale;
};
TORCH_MODULE(Pixels);

TEST(NodesOfAChain, AnInputOfIntegersIsKept) {
  Probed net(2);
  Pixels pixels;
  memcnn::ReversibleSequence sequence(pixels, net.blocks[0], net.blocks[1]);
  const torch::Tensor x =
      torch::arange(4 * kSize).view({2, 2 * kSize}).to(torch::kUInt8) + 1;
  const auto gradients = [&](const torch::Tensor& y) {
    return torch::autograd::grad({y.square().sum()}, sequence->parameters());
  };
  const auto expected =
      gradients(net.blocks[1](net.blocks[0](pixels->forward(x))));
  EXPECT_LT(
      relative_error(gradients(sequence->forward(x)), expected),
      kGradientFloat64);
}

/// Returns nothing.
struct SilentImpl final : torch::nn::Cloneable<SilentImpl> {
  void reset() override {}
  torch::Tensor forward(torch::Tensor /*x*/) {
    return {};
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y;
  }
};
TORCH_MODULE(Silent);

TEST(NodesOfAChain, ABlockThatReturnsAnUndefinedTensorIsNamed) {
  const Pixels pixels;
  memcnn::ReversibleSequence sequence(pixels, Silent(), pixels);
  EXPECT_THAT(
      [&] { sequence->forward(leaf({2})); },
      ThrowsError<c10::Error>(testing::AllOf(
          HasSubstr("expected defined tensors from the module, but got an "
                    "undefined one"),
          HasSubstr("block 1 ("),
          HasSubstr("SilentImpl"))));
}

TEST(NodesOfAChain, TwentyThousandBlocksAreBuiltAndDropped) {
  memcnn::ReversibleSequence sequence{memcnn::ReversibleSequenceOptions()};
  const Nothing block;
  for (int i = 0; i < 20'000; ++i) {
    sequence->push_back(block);
  }
  const torch::Tensor x = torch::ones({1}).requires_grad_();
  sequence->forward(x); // dropped without a pass
  const torch::Tensor y = sequence->forward(x);
  y.backward();
  EXPECT_EQ(x.grad().item<float>(), 1);
  EXPECT_EQ(block->scale.grad().item<float>(), 20'000);
}

TEST(NodesOfAChain, LetsGoOfAllThatItHeldWithItsPass) {
  torch::Tensor y;
  std::weak_ptr<torch::nn::Module> alive;
  {
    Probed net(3);
    alive = net.blocks[1].ptr();
    y = net.run();
  }
  EXPECT_FALSE(alive.expired()); // backward needs it
  y = torch::Tensor();
  EXPECT_TRUE(alive.expired());
}

TEST(NodesOfAChain, RefusesTangentsOfForwardMode) {
  Probed net(2);
  const uint64_t level = torch::autograd::ForwardADLevel::get_next_idx();
  {
    torch::Tensor x = leaf({2, 2 * kSize});
    x._set_fw_grad(torch::ones_like(x), level, /*is_inplace_op=*/false);
    EXPECT_THAT(
        [&] { net.sequence->forward(x); },
        ThrowsError<c10::Error>(HasSubstr(
            "ReversibleSequence::forward(): expected tensors without a tangent "
            "of forward-mode differentiation")));
  }
  torch::autograd::ForwardADLevel::release_idx(level);
}

} // namespace
} // namespace memcnn_test
