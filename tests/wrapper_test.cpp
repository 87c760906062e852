// SPDX-License-Identifier: MIT

#include "support/counted_operators.h"
#include "support/modules.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace memcnn_test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// The signatures that a user's own module may have.

/// One tensor to two and back: its parts are wrapped in both directions.
struct SplitImpl final : torch::nn::Cloneable<SplitImpl> {
  SplitImpl() {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, 2., torch::kDouble));
  }
  std::tuple<torch::Tensor, torch::Tensor> forward(torch::Tensor x) const {
    const auto halves = (x * weight).chunk(2, /*dim=*/1);
    return {halves[0].clone(), halves[1].clone()};
  }
  torch::Tensor inverse(const torch::Tensor& a, const torch::Tensor& b) {
    return torch::cat({a, b}, /*dim=*/1) / weight;
  }
  torch::Tensor weight;
};
TORCH_MODULE(Split);

/// Two tensors to one and back.
struct ConcatImpl final : torch::nn::Cloneable<ConcatImpl> {
  void reset() override {}
  torch::Tensor forward(torch::Tensor a, torch::Tensor b) {
    return torch::cat({a, b}, /*dim=*/1);
  }
  std::tuple<torch::Tensor, torch::Tensor> inverse(torch::Tensor y) {
    const auto halves = y.chunk(2, /*dim=*/1);
    return {halves[0].clone(), halves[1].clone()};
  }
};
TORCH_MODULE(Concat);

/// A vector of any length, each entry scaled.
struct ScaleAllImpl final : torch::nn::Cloneable<ScaleAllImpl> {
  ScaleAllImpl() {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, 3., torch::kDouble));
  }
  std::vector<torch::Tensor> forward(std::vector<torch::Tensor> xs) {
    for (torch::Tensor& x : xs) {
      x = x * weight;
    }
    return xs;
  }
  std::vector<torch::Tensor> inverse(const std::vector<torch::Tensor>& ys) {
    std::vector<torch::Tensor> xs;
    for (const torch::Tensor& y : ys) {
      xs.push_back(y / weight);
    }
    return xs;
  }
  torch::Tensor weight;
};
TORCH_MODULE(ScaleAll);

/// Scales where a mask says so, and shifts by an integer tensor: both pass.
struct MaskedImpl final : torch::nn::Cloneable<MaskedImpl> {
  using Pack = std::tuple<torch::Tensor, torch::Tensor, torch::Tensor>;
  MaskedImpl() {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, 2., torch::kDouble));
  }
  Pack forward(Pack pack) {
    const auto& [x, mask, shift] = pack;
    return {torch::where(mask, x * weight, x) + shift, mask, shift};
  }
  Pack inverse(Pack pack) {
    const auto& [y, mask, shift] = pack;
    const torch::Tensor x = y - shift;
    return {torch::where(mask, x / weight, x), mask, shift};
  }
  torch::Tensor weight;
};
TORCH_MODULE(Masked);

class InvertibleModuleWrapper : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};

TEST_F(InvertibleModuleWrapper, SplitsAndConcatenates) {
  Split module;
  Concat join;
  memcnn::InvertibleModuleWrapper split(module);
  memcnn::InvertibleModuleWrapper concat(join);
  const torch::Tensor x = leaf({2, 4, 3});

  auto [a, b] = split(x * 2);
  torch::Tensor y = concat(a, b);
  const auto found =
      torch::autograd::grad({y.pow(3).sum()}, {x, module->weight});

  auto [plain_a, plain_b] = module->forward(x * 2);
  const auto expected = torch::autograd::grad(
      {join(plain_a, plain_b).pow(3).sum()}, {x, module->weight});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  EXPECT_LT(relative_error(split->inverse(a, b), x * 2), kRoundTripFloat64);
}

TEST_F(InvertibleModuleWrapper, InverseOfSplitFreesAndRebuildsBothParts) {
  Split module;
  memcnn::InvertibleModuleWrapper split(module);
  const torch::Tensor leaf_a = leaf({2, 2, 3});
  const torch::Tensor leaf_b = leaf({2, 2, 3});
  const torch::Tensor a = leaf_a * 2;
  const torch::Tensor b = leaf_b * 2;
  const torch::Tensor values = b.detach().clone();
  const torch::Tensor x = split->inverse(a, b);
  EXPECT_THAT(
      [&] { b.sum(); },
      ThrowsError<c10::Error>(HasSubstr("keep_input_inverse(true)")));
  const auto found = torch::autograd::grad({x.pow(3).sum()}, {leaf_a, leaf_b});
  const auto expected = torch::autograd::grad(
      {module->inverse(leaf_a * 2, leaf_b * 2).pow(3).sum()}, {leaf_a, leaf_b});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  EXPECT_LT(relative_error(b, values), kRoundTripFloat64);
}

TEST_F(InvertibleModuleWrapper, OneOfSeveralOutputsUnused) {
  Split module;
  memcnn::InvertibleModuleWrapper split(module);
  const torch::Tensor x = leaf({2, 4, 3});
  auto [used, unused] = split(x * 2);
  const auto found =
      torch::autograd::grad({used.pow(3).sum()}, {x, module->weight});
  auto [plain_used, plain_unused] = module->forward(x * 2);
  const auto expected =
      torch::autograd::grad({plain_used.pow(3).sum()}, {x, module->weight});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST_F(InvertibleModuleWrapper, TakesAndReturnsVectors) {
  ScaleAll module;
  memcnn::InvertibleModuleWrapper all(module);
  for (const size_t count : {1u, 3u}) {
    std::vector<torch::Tensor> leaves;
    std::vector<torch::Tensor> inputs;
    for (size_t i = 0; i < count; ++i) {
      leaves.push_back(leaf({static_cast<int64_t>(i) + 1, 2}));
      inputs.push_back(leaves.back() * 2);
    }
    const auto cube = [](const std::vector<torch::Tensor>& ys) {
      torch::Tensor sum = torch::zeros({}, torch::kDouble);
      for (const torch::Tensor& y : ys) {
        sum = sum + y.pow(3).sum();
      }
      return sum;
    };
    auto sources = leaves;
    sources.push_back(module->weight);
    const auto expected =
        torch::autograd::grad({cube(module->forward(inputs))}, sources);
    for (size_t i = 0; i < count; ++i) {
      inputs[i] = leaves[i] * 2;
    }
    const auto ys = all(inputs);
    ASSERT_EQ(ys.size(), count);
    EXPECT_LT(
        relative_error(torch::autograd::grad({cube(ys)}, sources), expected),
        kGradientFloat64);
  }
}

TEST_F(InvertibleModuleWrapper, IntegerAndMaskTensorsPassThrough) {
  Masked module;
  memcnn::InvertibleModuleWrapper masked(module);
  const torch::Tensor x = leaf({2, 4});
  const torch::Tensor mask = torch::rand({2, 4}) > 0.5;
  const torch::Tensor shift = torch::randint(5, {2, 4}, torch::kLong);
  const torch::Tensor input = x * 2;
  const auto [y, mask_out, shift_out] =
      masked(std::make_tuple(input, mask, shift));
  EXPECT_THAT(
      [&] { input.sum(); },
      ThrowsError<c10::Error>(HasSubstr("keep_input(true)")));
  EXPECT_TRUE(mask_out.equal(mask));
  EXPECT_TRUE(shift_out.equal(shift));
  const auto found =
      torch::autograd::grad({y.pow(3).sum()}, {x, module->weight});
  const auto expected = torch::autograd::grad(
      {std::get<0>(module->forward(std::make_tuple(x * 2, mask, shift)))
           .pow(3)
           .sum()},
      {x, module->weight});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

// Options.

TEST_F(InvertibleModuleWrapper, DisableRunsThePlainModule) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  memcnn::InvertibleModuleWrapper block(
      coupling, memcnn::InvertibleModuleWrapperOptions().disable(true));
  const torch::Tensor input = leaf({2, 4, 3, 3}, torch::kFloat) * 2;
  const torch::Tensor y = block(input);
  EXPECT_EQ(y.grad_fn()->name(), "CatBackward0");
  EXPECT_NO_THROW(input.sum());
}

TEST_F(InvertibleModuleWrapper, OptionsCanBeChangedBetweenCalls) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  memcnn::InvertibleModuleWrapper block(coupling);
  const torch::Tensor first = leaf({2, 4, 3, 3}, torch::kFloat) * 2;
  block(first);
  EXPECT_THROW(first.sum(), c10::Error);
  block->options.keep_input(true);
  const torch::Tensor second = leaf({2, 4, 3, 3}, torch::kFloat) * 2;
  block(second);
  EXPECT_NO_THROW(second.sum());
  EXPECT_EQ(block->input_kept_because(), "keep_input is set");
}

TEST_F(InvertibleModuleWrapper, PreserveRngStateCanBeTurnedOff) {
  // Then a branch draws new numbers in backward, and the caller's generator
  // moves on.
  torch::nn::AnyModule f(DropoutBranch(2));
  Chain chain({Coupling(f, torch::nn::AnyModule(SmoothBranch(2)))});
  memcnn::InvertibleModuleWrapper careless(
      chain.block(0),
      memcnn::InvertibleModuleWrapperOptions().preserve_rng_state(false));
  const torch::Tensor y = careless(leaf({2, 4, 3, 3}, torch::kFloat) * 2);
  const auto state = [] {
    return at::globalContext()
        .defaultGenerator(at::Device(at::kCPU))
        .get_state();
  };
  const torch::Tensor before = state();
  y.sum().backward();
  EXPECT_FALSE(state().equal(before));
}

TEST_F(InvertibleModuleWrapper, KeepInputNeedsNoInverse) {
  // The inverse is wrong on purpose: it is not called where inputs are kept.
  struct LossyImpl : torch::nn::Cloneable<LossyImpl> {
    void reset() override {}
    torch::Tensor forward(torch::Tensor x) {
      return x.square();
    }
    torch::Tensor inverse(torch::Tensor y) {
      return y.sqrt(); // loses the sign
    }
  };
  torch::nn::ModuleHolder<LossyImpl> lossy(std::make_shared<LossyImpl>());
  memcnn::InvertibleModuleWrapper keeping(
      lossy, memcnn::InvertibleModuleWrapperOptions().keep_input(true));
  const torch::Tensor x = leaf({5});
  const auto gradient = torch::autograd::grad({keeping(x * 2).sum()}, {x});
  EXPECT_LT(relative_error(gradient[0], 8 * x.detach()), kGradientFloat64);
}

// The memory budget.

/// A convolution by an orthogonal matrix: its result is what it returns.
struct RotationImpl final : torch::nn::Cloneable<RotationImpl> {
  RotationImpl() {
    reset();
  }
  void reset() override {
    const auto q =
        std::get<0>(torch::linalg_qr(torch::randn({4, 4}, torch::kDouble)));
    weight = register_parameter("weight", q.reshape({4, 4, 1, 1}).clone());
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::conv2d(x, weight);
  }
  torch::Tensor inverse(torch::Tensor y) {
    return torch::conv2d(y, weight.transpose(0, 1));
  }
  torch::Tensor weight;
};
TORCH_MODULE(Rotation);

/// One step through two wrappers of modules, the first of which has a budget,
/// against plain autograd. Returns the convolutions of backward.
template <class M>
int convolutions_of_backward(M module, int64_t budget) {
  module->to(torch::kDouble);
  memcnn::InvertibleModuleWrapper first(module);
  first->options.memory_budget(budget);
  torch::nn::Identity identity;
  memcnn::InvertibleModuleWrapper second{memcnn::AdditiveCoupling(identity)};
  const torch::Tensor x = leaf({2, 4, 3, 3});
  std::vector<torch::Tensor> sources = module->parameters();
  sources.push_back(x);
  const auto loss = [&] {
    return second(first(torch::sin(x))).pow(3).sum();
  };
  const auto expected = [&] {
    const memcnn::PlainAutogradGuard plain;
    return torch::autograd::grad({loss()}, sources);
  }();
  const torch::Tensor saving = loss();
  const CountedOperators counted;
  const auto found = torch::autograd::grad({saving}, sources);
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  return counted.count("aten::convolution");
}

constexpr int64_t kResultBytes = 2 * 2 * 3 * 3 * 8; // of half an input

TEST_F(InvertibleModuleWrapper, BudgetKeepsResultsOfBranches) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  EXPECT_EQ(convolutions_of_backward(coupling, 0), 2);
  EXPECT_EQ(convolutions_of_backward(coupling, kResultBytes - 1), 2);
  EXPECT_EQ(convolutions_of_backward(coupling, kResultBytes), 1);
  EXPECT_EQ(convolutions_of_backward(coupling, 2 * kResultBytes), 0);
}

TEST_F(InvertibleModuleWrapper, BudgetKeepsWhatTheModuleReturns) {
  // Backward runs the inverse, and then forward again.
  EXPECT_EQ(convolutions_of_backward(Rotation(), 0), 2);
  EXPECT_EQ(convolutions_of_backward(Rotation(), 2 * kResultBytes), 1);
}

TEST_F(InvertibleModuleWrapper, BudgetReachesTheBlocksOfASequence) {
  const auto chain = [] {
    return memcnn::ReversibleSequence(
        memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2)),
        memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2)));
  };
  EXPECT_EQ(convolutions_of_backward(chain(), 3 * kResultBytes), 1);
  EXPECT_EQ(convolutions_of_backward(chain(), 4 * kResultBytes), 0);
}

TEST_F(InvertibleModuleWrapper, ASequenceInsideKeepsByItsOwnBudget) {
  memcnn::ReversibleSequence chain(
      memcnn::ReversibleSequenceOptions().memory_budget(kResultBytes),
      memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2)),
      memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2)));
  chain->to(torch::kDouble);
  memcnn::InvertibleModuleWrapper block(
      chain, memcnn::InvertibleModuleWrapperOptions().memory_budget(1 << 20));
  for (int step = 0; step < 2; ++step) { // measured, and as planned
    block(torch::sin(leaf({2, 4, 3, 3}))).sum().backward();
    EXPECT_EQ(chain->kept().results, 1u) << step;
    EXPECT_EQ(block->kept().results, 0u) << step;
  }
}

TEST_F(InvertibleModuleWrapper, BudgetInInverse) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  coupling->to(torch::kDouble);
  memcnn::InvertibleModuleWrapper block(
      coupling,
      memcnn::InvertibleModuleWrapperOptions().memory_budget(1 << 20));
  const torch::Tensor y = leaf({2, 4, 3, 3});
  const auto expected =
      torch::autograd::grad({coupling->inverse(y * 2).pow(3).sum()}, {y});
  const torch::Tensor loss = block->inverse(y * 2).pow(3).sum();
  EXPECT_EQ(block->kept().results, 2u);
  const CountedOperators counted;
  const auto found = torch::autograd::grad({loss}, {y});
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
  EXPECT_EQ(counted.count("aten::convolution"), 0);
}

TEST_F(InvertibleModuleWrapper, KeptTellsOfTheLastCallWithAGraph) {
  memcnn::AdditiveCoupling coupling(SmoothBranch(2), SmoothBranch(2));
  coupling->to(torch::kDouble);
  memcnn::InvertibleModuleWrapper block(coupling);
  const torch::Tensor x = leaf({2, 4, 3, 3});
  const auto held = [&](int64_t budget) {
    block->options.memory_budget(budget);
    memcnn::AllocationMeter meter;
    const torch::Tensor y = block(torch::sin(x));
    return meter.held_bytes();
  };
  const int64_t held_without = held(0);
  EXPECT_EQ(c10::str(block->kept()), "nothing");
  const int64_t held_with = held(1 << 20);
  const memcnn::KeptActivations kept = block->kept();
  EXPECT_EQ(kept.bytes, 2 * kResultBytes);
  EXPECT_EQ(kept.bytes, held_with - held_without);
  EXPECT_EQ(kept.blocks, 0u);
  EXPECT_EQ(kept.results, 2u);
  EXPECT_EQ(kept.multiply_adds, 2 * (2 * 2 * 3 * 3) * (2 * 3 * 3));
  EXPECT_EQ(kept.spared, kept.multiply_adds);
  {
    const torch::NoGradGuard no_graph;
    block(x);
  }
  EXPECT_EQ(block->kept().results, 2u);
  EXPECT_THAT(
      c10::str(block),
      HasSubstr("Wrapper(memory_budget=1048576, kept=2 results)(\n"));
  EXPECT_EQ(held(kResultBytes), held_without + kResultBytes);
  EXPECT_EQ(
      c10::str(block->kept()),
      "0.00 MiB: 1 result, sparing 50 % of the multiply-adds of second runs");
}

TEST_F(InvertibleModuleWrapper, BudgetLeavesInputsFreed) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AdditiveCoupling(SmoothBranch(2), SmoothBranch(2)),
      memcnn::InvertibleModuleWrapperOptions().memory_budget(1 << 20));
  const torch::Tensor input = leaf({2, 4, 3, 3}, torch::kFloat) * 2;
  block(input);
  EXPECT_EQ(block->input_kept_because(), "");
  EXPECT_THROW(input.sum(), c10::Error);
}

TEST_F(InvertibleModuleWrapper, RejectsANegativeBudget) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AdditiveCoupling(SmoothBranch(2)),
      memcnn::InvertibleModuleWrapperOptions().memory_budget(-1));
  EXPECT_THAT(
      [&] {
        block->inverse(leaf({2, 4, 3, 3}, torch::kFloat));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "InvertibleModuleWrapper::inverse(): expected a memory_budget of 0 "
          "or more bytes, but got -1. 0 keeps no activations.")));
}

// As a module.

TEST_F(InvertibleModuleWrapper, PrintsItsOptions) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AdditiveCoupling(SmoothBranch(2)),
      memcnn::InvertibleModuleWrapperOptions().keep_input(true));
  std::ostringstream stream;
  stream << block;
  EXPECT_THAT(
      stream.str(),
      AllOf(
          HasSubstr("memcnn::InvertibleModuleWrapper(keep_input=true)(\n"),
          HasSubstr("(_fn): memcnn::AdditiveCoupling(split_dim=1)")));
}

TEST_F(InvertibleModuleWrapper, OneArgumentOfItsTypeShares) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AdditiveCoupling(SmoothBranch(2)));
  memcnn::InvertibleModuleWrapper again(block);
  EXPECT_EQ(again.ptr(), block.ptr());
  memcnn::InvertibleModuleWrapper nested(
      block, memcnn::InvertibleModuleWrapperOptions());
  EXPECT_EQ(nested->module.ptr(), block.ptr());
}

TEST_F(InvertibleModuleWrapper, CloneIsDeepAndKeepsModesAndOptions) {
  memcnn::InvertibleModuleWrapper block(
      memcnn::AdditiveCoupling(SmoothBranch(2)),
      memcnn::InvertibleModuleWrapperOptions().keep_input(true));
  block->train();
  block->module->f->eval();
  using Impl = decltype(block)::Impl;
  const auto copy = std::dynamic_pointer_cast<Impl>(block->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_TRUE(copy->options.keep_input());
  EXPECT_TRUE(copy->is_training());
  EXPECT_FALSE(copy->module->f->is_training());
  EXPECT_TRUE(all_equal(copy->parameters(), block->parameters()));
  EXPECT_FALSE(copy->parameters()[0].is_same(block->parameters()[0]));
}

} // namespace
} // namespace memcnn_test
