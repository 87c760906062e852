// SPDX-License-Identifier: MIT
//
// Note [Recomputation], rule by rule, for the wrapper and the sequence.

#include "../support/autocast.h"
#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>

#include <memory>
#include <string>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

using torch::nn::AnyModule;

constexpr int64_t kChannels = 6; // of a whole tensor; a branch has half

AnyModule conv_branch() {
  torch::nn::AnyModule branch(ConvBranch(kChannels / 2));
  branch.ptr()->to(torch::kDouble);
  return branch;
}

AnyModule linear_branch(ProbedLinearImpl::Probe probe) {
  return AnyModule(ProbedLinear(4, std::move(probe)));
}

torch::Tensor image_leaf() {
  return leaf({2, kChannels, 5, 5});
}

torch::Tensor generator_state() {
  return at::detail::getDefaultCPUGenerator().get_state();
}

class Recomputation : public testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

INSTANTIATE_TEST_SUITE_P(Engines, Recomputation, all_engines(), engine_name);

// Rule 1: what runs again sees what forward saw.

TEST_P(Recomputation, Rule1ReplaysTheRandomNumbersOfEachBranch) {
  Chain plain = Chain::make(3, [] {
    torch::nn::AnyModule branch(DropoutBranch(kChannels / 2));
    branch.ptr()->to(torch::kDouble);
    return branch;
  });
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  const torch::Tensor x_twin = x.detach().clone().requires_grad_();

  torch::manual_seed(7);
  plain.plain(made_by_a_layer(x)).square().sum().backward();
  const torch::Tensor after_plain = generator_state();
  torch::manual_seed(7);
  saving.run(GetParam(), made_by_a_layer(x_twin)).square().sum().backward();

  EXPECT_LT(relative_error(x_twin.grad(), x.grad()), kGradientFloat64);
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
  EXPECT_TRUE(generator_state().equal(after_plain));
}

TEST_P(Recomputation, Rule1LeavesTheCallersGeneratorAlone) {
  Chain chain = Chain::make(2, [] {
    torch::nn::AnyModule branch(DropoutBranch(kChannels / 2));
    branch.ptr()->to(torch::kDouble);
    return branch;
  });
  const torch::Tensor loss =
      chain.run(GetParam(), made_by_a_layer(image_leaf())).square().sum();
  torch::rand({5}); // the caller goes on drawing
  const torch::Tensor before = generator_state();
  loss.backward();
  EXPECT_TRUE(generator_state().equal(before));
}

TEST_P(Recomputation, Rule1ReplaysAutocast) {
  std::vector<bool> enabled;
  std::vector<torch::ScalarType> dtypes;
  Chain chain = Chain::make(1, [&] {
    return linear_branch([&](const torch::Tensor&) {
      enabled.push_back(at::autocast::is_autocast_enabled(at::kCPU));
      dtypes.push_back(at::autocast::get_autocast_dtype(at::kCPU));
    });
  });
  const auto found = at::autocast::get_autocast_dtype(at::kCPU);
  torch::Tensor y;
  {
    const Autocast autocast(torch::kCPU, torch::kBFloat16);
    y = chain.run(GetParam(), made_by_a_layer(leaf({3, 8}, torch::kFloat)));
  }
  y.sum().backward();
  // F and G forward, G and F again.
  EXPECT_EQ(enabled, std::vector<bool>({true, true, true, true}));
  EXPECT_EQ(dtypes, std::vector<torch::ScalarType>(4, torch::kBFloat16));
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  EXPECT_EQ(at::autocast::get_autocast_dtype(at::kCPU), found);
}

TEST_P(Recomputation, Rule1ReplaysTrainAndEvalMode) {
  Chain plain = Chain::make(2, conv_branch);
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  // One part of each differs from the others.
  for (Chain* chain : {&plain, &saving}) {
    chain->module().train();
    chain->block(0)->f.ptr()->eval();
  }
  const torch::Tensor expected = plain.plain(made_by_a_layer(x));
  const torch::Tensor y = saving.run(GetParam(), made_by_a_layer(x));
  saving.module().eval();

  expected.square().sum().backward();
  y.square().sum().backward();
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
  for (const auto& part : saving.module().modules()) {
    EXPECT_FALSE(part->is_training()) << part->name();
  }
}

// Rule 2: buffers change once per training step.

TEST_P(Recomputation, Rule2RunningStatisticsEqualThePlainNetworksBitForBit) {
  Chain plain = Chain::make(3, conv_branch);
  Chain saving = plain.twin();
  for (int step = 0; step < 3; ++step) {
    const torch::Tensor x = image_leaf();
    plain.plain(made_by_a_layer(x)).square().sum().backward();
    saving.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  }
  const auto buffers = saving.module().buffers();
  ASSERT_EQ(buffers.size(), 3 * 2 * 3u); // each branch has one BatchNorm2d
  EXPECT_TRUE(all_equal(buffers, plain.module().buffers()));
  EXPECT_EQ(saving.module().named_buffers().back().value().item<int64_t>(), 3);
}

TEST_P(Recomputation, Rule2HoldsForBuffersThatForwardReads) {
  Chain plain = Chain::make(2, [] { return AnyModule(Counting()); });
  Chain saving = plain.twin();
  const torch::Tensor x = leaf({3, 4});
  for (int step = 0; step < 2; ++step) {
    // Twice in one graph: what the first run saw is no longer there.
    plain.plain(plain.plain(made_by_a_layer(x))).square().sum().backward();
    saving.run(GetParam(), saving.run(GetParam(), made_by_a_layer(x)))
        .square()
        .sum()
        .backward();
  }
  EXPECT_TRUE(all_equal(saving.module().buffers(), plain.module().buffers()));
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
}

TEST_P(Recomputation, Rule2StopsWhereBuffersThatEvalReadChange) {
  Chain chain = Chain::make(1, conv_branch);
  chain.module().eval();
  const torch::Tensor y = chain.run(GetParam(), made_by_a_layer(image_leaf()));
  chain.module().train();
  {
    torch::NoGradGuard no_grad;
    chain.plain(image_leaf());
  }
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("expected the parameters and buffers that forward read to "
                    "be unchanged in backward"),
          HasSubstr("Run backward first")));
}

// Rule 3: parameters are inputs of the node.

TEST_P(Recomputation, Rule3GradWithRespectToASubset) {
  Chain plain = Chain::make(2, conv_branch);
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  const auto subset = [](const Chain& chain) {
    const auto all = chain.parameters();
    return std::vector<torch::Tensor>{all.front(), all.back()};
  };
  const auto expected = torch::autograd::grad(
      {plain.plain(made_by_a_layer(x)).square().sum()}, subset(plain));
  const auto found = torch::autograd::grad(
      {saving.run(GetParam(), made_by_a_layer(x)).square().sum()},
      subset(saving));
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  for (const torch::Tensor& gradient : saving.gradients()) {
    EXPECT_FALSE(gradient.defined()) << "grad() accumulates nowhere";
  }
}

TEST_P(Recomputation, Rule3BackwardWithInputsAccumulatesThereOnly) {
  Chain chain = Chain::make(2, conv_branch);
  const torch::Tensor x = image_leaf();
  const auto all = chain.parameters();
  chain.run(GetParam(), made_by_a_layer(x))
      .sum()
      .backward(
          /*gradient=*/{},
          /*retain_graph=*/std::nullopt,
          /*create_graph=*/false,
          std::vector<torch::Tensor>{all.front()});
  EXPECT_TRUE(all.front().grad().defined());
  EXPECT_FALSE(all.back().grad().defined());
  EXPECT_FALSE(x.grad().defined());
}

TEST_P(Recomputation, Rule3HooksOfParametersFireOnceOnTheWholeGradient) {
  Chain chain = Chain::make(2, conv_branch);
  int calls = 0;
  std::vector<torch::Tensor> seen;
  for (torch::Tensor& parameter : chain.parameters()) {
    parameter.register_hook([&](const torch::Tensor& gradient) {
      ++calls;
      seen.push_back(gradient.detach().clone());
    });
  }
  for (int pass = 1; pass <= 2; ++pass) { // hooks are still there afterwards
    seen.clear();
    chain.module().zero_grad();
    chain.run(GetParam(), made_by_a_layer(image_leaf())).sum().backward();
    EXPECT_EQ(calls, pass * static_cast<int>(chain.parameters().size()));
    for (const torch::Tensor& gradient : chain.gradients()) {
      EXPECT_TRUE(std::any_of(seen.begin(), seen.end(), [&](auto& other) {
        return other.sizes() == gradient.sizes() && other.equal(gradient);
      }));
    }
  }
}

TEST_P(Recomputation, Rule3FrozenAndUnusedParametersGetNoGradient) {
  struct WithSpareImpl : torch::nn::Cloneable<WithSpareImpl> {
    WithSpareImpl() {
      reset();
    }
    void reset() override {
      used = register_parameter("used", torch::full({1}, 0.3, torch::kDouble));
      frozen = register_parameter(
          "frozen", torch::ones({1}, torch::kDouble), /*requires_grad=*/false);
      spare = register_parameter("spare", torch::ones({1}, torch::kDouble));
    }
    torch::Tensor forward(torch::Tensor x) {
      return torch::sin(x * used) * frozen;
    }
    torch::Tensor used, frozen, spare;
  };
  Chain chain = Chain::make(
      2, [] { return AnyModule(std::make_shared<WithSpareImpl>()); });
  chain.run(GetParam(), made_by_a_layer(leaf({3, 4}))).sum().backward();
  for (const auto& parameter : chain.module().named_parameters()) {
    const bool used = parameter.key().find("used") != std::string::npos;
    EXPECT_EQ(parameter.value().grad().defined(), used) << parameter.key();
  }
}

TEST_P(Recomputation, Rule3ParametersChangedBeforeBackwardAreAnError) {
  Chain chain = Chain::make(1, conv_branch);
  const torch::Tensor y = chain.run(GetParam(), made_by_a_layer(image_leaf()));
  {
    torch::NoGradGuard no_grad;
    chain.parameters().front().mul_(2);
  }
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("expected its parameters to be unchanged between forward "
                    "and backward"),
          HasSubstr("Step the optimiser after backward")));
}

TEST_P(Recomputation, Rule3TensorsFromElsewhereAreAnErrorNotALostGradient) {
  const torch::Tensor foreign = torch::ones({4}, torch::kFloat);
  foreign.requires_grad_();
  Chain chain = Chain::make(1, [&] {
    return AnyModule(torch::nn::Functional(
        [foreign](const torch::Tensor& x) { return x * foreign; }));
  });
  const torch::Tensor y =
      chain.run(GetParam(), made_by_a_layer(leaf({3, 8}, torch::kFloat)));
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("arguments and registered parameters only"),
          HasSubstr("register_parameter()")));
}

// Rule 4: retained graphs and second derivatives.

TEST_P(Recomputation, Rule4SecondBackwardOverARetainedGraph) {
  Chain plain = Chain::make(3, conv_branch);
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  const torch::Tensor x_twin = x.detach().clone().requires_grad_();
  const torch::Tensor expected = plain.plain(made_by_a_layer(x)).square().sum();
  const torch::Tensor loss =
      saving.run(GetParam(), made_by_a_layer(x_twin)).square().sum();
  for (int pass = 0; pass < 2; ++pass) {
    const bool retain = pass == 0;
    expected.backward(/*gradient=*/{}, retain);
    loss.backward(/*gradient=*/{}, retain);
    EXPECT_LT(relative_error(x_twin.grad(), x.grad()), kGradientFloat64);
    EXPECT_LT(
        relative_error(saving.gradients(), plain.gradients()),
        kGradientFloat64);
  }
}

TEST_P(Recomputation, Rule4SecondBackwardOverAFreedGraphIsAnError) {
  Chain chain = Chain::make(1, conv_branch);
  const torch::Tensor y = chain.run(GetParam(), made_by_a_layer(image_leaf()));
  y.sum().backward();
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("expected one backward pass"),
          HasSubstr("retain_graph = true")));
}

TEST_P(Recomputation, Rule4SecondDerivativesEqualPlainOnes) {
  const auto second =
      [](const torch::Tensor& y, const torch::Tensor& x, const Chain& chain) {
        std::vector<torch::Tensor> sources = chain.parameters();
        sources.push_back(x);
        const auto first = torch::autograd::grad(
            {y.pow(3).sum()},
            sources,
            {},
            /*retain_graph=*/true,
            /*create_graph=*/true);
        torch::Tensor penalty = torch::zeros({}, torch::kDouble);
        for (const torch::Tensor& gradient : first) {
          penalty = penalty + gradient.square().sum();
        }
        return torch::autograd::grad(
            {penalty}, sources, {}, std::nullopt, false, /*allow_unused=*/true);
      };
  Chain plain = Chain::make(2, [] {
    torch::nn::AnyModule branch(SmoothBranch(kChannels / 2));
    branch.ptr()->to(torch::kDouble);
    return branch;
  });
  Chain saving = plain.twin();
  const torch::Tensor x = image_leaf();
  const auto expected = second(plain.plain(made_by_a_layer(x)), x, plain);
  const auto found =
      second(saving.run(GetParam(), made_by_a_layer(x)), x, saving);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_P(Recomputation, Rule4OneBlockTwiceFindsItsModesAndBuffersAgain) {
  // Both runs of the block replay at once when a graph is built.
  memcnn::AdditiveCoupling block(conv_branch(), conv_branch());
  memcnn::ReversibleSequence twice(block, block);
  const torch::Tensor x = image_leaf();
  const torch::Tensor y = twice(made_by_a_layer(x));
  block->eval();
  const auto buffers = block->buffers();
  std::vector<torch::Tensor> values;
  for (const torch::Tensor& buffer : buffers) {
    values.push_back(buffer.clone());
  }
  torch::autograd::grad(
      {y.square().sum()},
      {x},
      {},
      /*retain_graph=*/true,
      /*create_graph=*/true);
  EXPECT_FALSE(block->is_training());
  EXPECT_TRUE(all_equal(block->buffers(), values));
  EXPECT_NO_THROW(block(x)); // eval mode reads the running statistics
}

TEST_P(Recomputation, Rule4TensorsFromElsewhereAreAnErrorThereToo) {
  const torch::Tensor foreign = torch::ones({4}, torch::kFloat);
  foreign.requires_grad_();
  Chain chain = Chain::make(1, [&] {
    return AnyModule(torch::nn::Functional(
        [foreign](const torch::Tensor& x) { return x * foreign; }));
  });
  const torch::Tensor x = leaf({3, 8}, torch::kFloat);
  const torch::Tensor y = chain.run(GetParam(), made_by_a_layer(x));
  EXPECT_THAT(
      [&] {
        torch::autograd::grad(
            {y.sum()}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true);
      },
      ThrowsError<c10::Error>(
          HasSubstr("arguments and registered parameters only")));
}

// Rule 5: the autocast weight cache is off.

TEST_P(Recomputation, Rule5AutocastCacheIsOffWhileBranchesRun) {
  std::vector<bool> cached;
  Chain chain = Chain::make(1, [&] {
    return linear_branch([&](const torch::Tensor&) {
      cached.push_back(at::autocast::is_autocast_cache_enabled());
    });
  });
  ASSERT_TRUE(at::autocast::is_autocast_cache_enabled());
  chain.run(GetParam(), made_by_a_layer(leaf({3, 8}, torch::kFloat)))
      .sum()
      .backward();
  EXPECT_EQ(cached, std::vector<bool>(4, false));
  EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
}

// Rule 6: without a graph the cost is that of the plain module.

TEST_P(Recomputation, Rule6WithoutAGraphNothingIsFreedOrSaved) {
  std::vector<bool> cached;
  Chain chain = Chain::make(2, [&] {
    return linear_branch([&](const torch::Tensor&) {
      cached.push_back(at::autocast::is_autocast_cache_enabled());
    });
  });
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({3, 8});
  const torch::Tensor copy = x.clone();
  const auto peak = [&](auto&& forward) {
    memcnn::AllocationMeter meter;
    const torch::Tensor y = forward();
    EXPECT_EQ(y.grad_fn(), nullptr);
    EXPECT_EQ(meter.held_bytes(), static_cast<int64_t>(y.nbytes()));
    return meter.peak_bytes();
  };
  const int64_t plain = peak([&] { return chain.plain(x); });
  EXPECT_LE(peak([&] { return chain.run(GetParam(), x); }), plain);
  EXPECT_TRUE(x.equal(copy));
  EXPECT_EQ(cached, std::vector<bool>(8, true));
}

TEST_P(Recomputation, Rule6EvalModeWithAGraphSavesMemory) {
  Chain chain = Chain::make(4, conv_branch);
  chain.module().eval();
  const torch::Tensor x = image_leaf();
  const auto held = [&](auto&& forward) {
    memcnn::AllocationMeter meter;
    const torch::Tensor y = forward(made_by_a_layer(x));
    return meter.held_bytes();
  };
  const auto whole = static_cast<int64_t>(x.nbytes());
  // Each of the eight branches has one result, of half the size.
  const int64_t results = GetParam() == Engine::kKeptResults ? 4 * whole : 0;
  EXPECT_LE(
      held([&](auto&& t) { return chain.run(GetParam(), t); }),
      2 * whole + results);
  EXPECT_GE(held([&](auto&& t) { return chain.plain(t); }), 8 * whole);
}

// Rule 7: inverse() is a forward of its own; a node that ran holds nothing.

TEST_P(Recomputation, Rule7InverseCountsAsOneForwardForBuffers) {
  Chain plain = Chain::make(1, conv_branch);
  Chain saving = plain.twin();
  const torch::Tensor y = image_leaf();
  plain.block(0)->inverse(made_by_a_layer(y)).sum().backward();
  saving.inverse(GetParam(), made_by_a_layer(y)).sum().backward();
  EXPECT_TRUE(all_equal(saving.module().buffers(), plain.module().buffers()));
  EXPECT_EQ(saving.module().named_buffers().back().value().item<int64_t>(), 1);
  EXPECT_LT(
      relative_error(saving.gradients(), plain.gradients()), kGradientFloat64);
}

TEST_P(Recomputation, Rule7ANodeHoldsNothingAfterBackward) {
  Chain chain = Chain::make(2, conv_branch);
  const torch::Tensor x = image_leaf();
  int64_t gradients = static_cast<int64_t>(x.nbytes());
  for (const torch::Tensor& parameter : chain.parameters()) {
    gradients += static_cast<int64_t>(parameter.nbytes());
  }
  memcnn::AllocationMeter meter;
  torch::Tensor y = chain.run(GetParam(), made_by_a_layer(x));
  const auto node = y.grad_fn(); // alive to the end
  y.sum().backward();
  y = torch::Tensor();
  EXPECT_EQ(meter.held_bytes(), gradients);
}

// Rule 8: a rebuilt input is like the true one.

TEST_P(Recomputation, Rule8AnInputOfAnotherKindIsAnError) {
  const auto wrong = [&](const torch::Tensor& x) {
    WrongInverse block(
        [](const torch::Tensor& y) { return (y / 2).to(torch::kFloat); });
    if (GetParam() == Engine::kWrapper) {
      return memcnn::InvertibleModuleWrapper(block)(x);
    }
    return memcnn::ReversibleSequence(block, Coupling(conv_branch()))(x);
  };
  const torch::Tensor y = wrong(made_by_a_layer(image_leaf()));
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(HasSubstr(
          "expected inverse() to rebuild an input of sizes [2, 6, 5, "
          "5], Double, cpu, but got sizes [2, 6, 5, 5], Float, cpu")));
}

// Rule 9: a second run's argument is laid out as the first one's; for other
// layouts and paths see second_run_test.cpp.

TEST_P(Recomputation, Rule9TheSecondArgumentHasTheStridesOfTheFirst) {
  std::vector<std::vector<int64_t>> seen;
  Chain chain = Chain::make(1, [&] {
    return AnyModule(ProbedProduct([&](const torch::Tensor& tensor) {
      seen.push_back(tensor.strides().vec());
    }));
  });
  const torch::Tensor x = torch::randn({1, 4, 3, 2})
                              .contiguous(torch::MemoryFormat::ChannelsLast)
                              .requires_grad_();
  chain.run(GetParam(), made_by_a_layer(x)).square().sum().backward();
  // F, G, then G with its value's gradient, F with its own.
  ASSERT_EQ(seen.size(), 6u);
  EXPECT_EQ(seen[2], seen[1]);
  EXPECT_EQ(seen[4], seen[0]);
  EXPECT_EQ(seen[3], seen[2]);
  EXPECT_EQ(seen[5], seen[4]);
}

// Rule 10: what nobody registered is found in debug mode, and only there.

TEST_P(Recomputation, Rule10DebugFindsHiddenState) {
  for (const bool debug : {false, true}) {
    SCOPED_TRACE(debug);
    double factor = 1;
    torch::nn::Functional hidden([&factor](const torch::Tensor& x) {
      factor *= 2;
      return x * factor;
    });
    memcnn::AdditiveCoupling coupling(hidden, hidden);
    memcnn::InvertibleModuleWrapper wrapper(
        coupling, memcnn::InvertibleModuleWrapperOptions().debug(debug));
    memcnn::ReversibleSequence sequence(
        memcnn::ReversibleSequenceOptions().debug(debug), coupling);
    const torch::Tensor input = made_by_a_layer(leaf({3, 4}));
    const torch::Tensor y =
        GetParam() == Engine::kWrapper ? wrapper(input) : sequence(input);
    const auto backward = [&] {
      y.sum().backward();
    };
    if (debug) {
      EXPECT_THAT(
          backward,
          ThrowsError<c10::Error>(HasSubstr("returned in forward for the same "
                                            "argument")));
    } else {
      EXPECT_NO_THROW(backward());
    }
  }
}

// Rule 11: gradients arrive block by block. More of it in
// nodes_of_a_chain_test.cpp.

TEST(RecomputationOfASequence, Rule11GradientsArriveBlockByBlock) {
  std::vector<std::string> events;
  Chain chain = Chain::make(3, [&] {
    return linear_branch([&](const auto&) { events.emplace_back("run"); });
  });
  for (torch::Tensor& parameter : chain.parameters()) {
    parameter.register_hook(
        [&](const torch::Tensor&) { events.emplace_back("gradient"); });
  }
  const torch::Tensor x = leaf({3, 8}, torch::kFloat);
  const torch::Tensor loss = chain.run(Engine::kSequence, x).sum();
  events.clear();
  loss.backward();
  std::vector<std::string> expected;
  for (int block = 0; block < 3; ++block) {
    expected.insert(expected.end(), 2, "run"); // F and G
    expected.insert(expected.end(), 4, "gradient"); // two weights, two biases
  }
  EXPECT_EQ(events, expected);
}

} // namespace
} // namespace memcnn_test
