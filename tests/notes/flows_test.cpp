// SPDX-License-Identifier: MIT
//
// Note [Flows]: log-determinants, conditions and anchors of chains and wrappers.

#include "../support/flow_modules.h"
#include "../support/gradcheck.h"
#include "../support/modules.h"
#include "../support/seen_operators.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace memcnn_test {
namespace {

using memcnn::Direction;
using memcnn::WithLogDet;
using testing::AllOf;
using testing::HasSubstr;
using torch::Tensor;

constexpr int64_t kChannels = 4;

/// Five blocks: one-sided and two-sided couplings, with a condition and without
/// one; modules of users of every kind.
void add_blocks(memcnn::ReversibleSequence& flow) {
  flow->push_back(memcnn::AffineCoupling(
      memcnn::AffineAdapterTanh{ConditionalBranch(2, 2, 4)},
      memcnn::Unchanged()));
  flow->push_back(Flipped());
  flow->push_back(Scaled(kChannels));
  flow->push_back(ConditionalScale(), {1});
  flow->push_back(
      memcnn::AffineCoupling(memcnn::AffineAdapterSigmoid(WideBranch(2))));
  flow->push_back(memcnn::AdditiveCoupling(SmoothBranch(2)));
}

memcnn::ReversibleSequence make_flow(size_t depth) {
  torch::manual_seed(4);
  memcnn::ReversibleSequence flow;
  while (flow->size() < depth) {
    add_blocks(flow);
  }
  flow->to(torch::kDouble);
  return flow;
}

/// The ways in which a flow saves memory.
enum class Way { kSequence, kWrapper, kNested, kAnchors, kBudget, kWhole };

std::string name_of(Way way) {
  switch (way) {
    case Way::kSequence:
      return "Sequence";
    case Way::kWrapper:
      return "Wrapper";
    case Way::kNested:
      return "Nested";
    case Way::kAnchors:
      return "Anchors";
    case Way::kBudget:
      return "Budget";
    default:
      return "AllKept";
  }
}

/// What of a flow's result a loss uses.
enum class Use { kOutput, kLogDet, kBoth };

using Case = std::tuple<Way, Direction, Use>;

std::string name_of_case(const testing::TestParamInfo<Case>& info) {
  const auto [way, direction, use] = info.param;
  return name_of(way) +
      (direction == Direction::kForward ? "Forward" : "Inverse") +
      (use == Use::kOutput       ? "Output"
           : use == Use::kLogDet ? "LogDet"
                                 : "Both");
}

class LogDets : public testing::TestWithParam<Case> {
 protected:
  static constexpr size_t kDepth = 24;

  LogDets() : flow(make_flow(kDepth)), plain(make_flow(kDepth)) {
    torch::manual_seed(5);
    x = leaf({2, kChannels, 3, 3});
    c = leaf({2, 2, 3, 3});
    c2 = leaf({2, 3, 3, 3});
    weights = torch::randn({2, kChannels, 3, 3}, torch::kDouble);
    plain->options.disable(true);
    switch (way()) {
      case Way::kAnchors:
        flow->options.anchor_every(5);
        break;
      case Way::kBudget:
        flow->options.memory_budget(20'000);
        break;
      case Way::kWhole:
        flow->options.memory_budget(100'000'000);
        break;
      default:
        break;
    }
  }

  static Way way() {
    return std::get<Way>(GetParam());
  }
  static Direction direction() {
    return std::get<Direction>(GetParam());
  }

  WithLogDet run(memcnn::ReversibleSequence& sequence) const {
    const Tensor in = made_by_a_layer(x);
    const std::vector<Tensor> given = {1.5 * c, c2 - 1};
    if (sequence.ptr() == plain.ptr()) {
      return map_with_log_det(sequence->given(given), direction(), in);
    }
    if (way() == Way::kWrapper) {
      memcnn::InvertibleModuleWrapper wrapped(sequence);
      return map_with_log_det(wrapped->given(given), direction(), in);
    }
    if (way() == Way::kNested) {
      memcnn::ReversibleSequence outer;
      outer->push_back(sequence);
      outer->push_back(Flipped());
      auto [y, log_det] = map_with_log_det(
          outer->given(given),
          direction(),
          direction() == Direction::kForward ? in : in.flip(1));
      return {direction() == Direction::kForward ? y.flip(1) : y, log_det};
    }
    return map_with_log_det(sequence->given(given), direction(), in);
  }

  /// A batch mean of the log-determinants, or the weight of one sample for all,
  /// would show.
  Tensor loss_of(const WithLogDet& result) const {
    const Tensor of_output = (result.output * weights).sum();
    const Tensor of_log_det =
        (result.log_det * torch::tensor({1.0, 10.0}, torch::kDouble)).sum();
    switch (std::get<Use>(GetParam())) {
      case Use::kOutput:
        return of_output;
      case Use::kLogDet:
        return of_log_det;
      default:
        return of_output + of_log_det;
    }
  }

  std::vector<Tensor> leaves(const memcnn::ReversibleSequence& sequence) const {
    std::vector<Tensor> leaves = sequence->parameters();
    leaves.insert(leaves.end(), {x, c, c2});
    return leaves;
  }

  std::vector<Tensor> gradients(
      const Tensor& loss,
      const memcnn::ReversibleSequence& sequence,
      bool retain_graph = false,
      bool create_graph = false) const {
    return torch::autograd::grad(
        {loss},
        leaves(sequence),
        /*grad_outputs=*/{},
        retain_graph,
        create_graph,
        /*allow_unused=*/true);
  }

  memcnn::ReversibleSequence flow;
  memcnn::ReversibleSequence plain;
  Tensor x;
  Tensor c;
  Tensor c2;
  Tensor weights;
};

INSTANTIATE_TEST_SUITE_P(
    Flows,
    LogDets,
    testing::Combine(
        testing::Values(
            Way::kSequence,
            Way::kWrapper,
            Way::kNested,
            Way::kAnchors,
            Way::kBudget,
            Way::kWhole),
        testing::Values(Direction::kForward, Direction::kInverse),
        testing::Values(Use::kOutput, Use::kLogDet, Use::kBoth)),
    name_of_case);

TEST_P(LogDets, Rule1GradientsEqualPlainAutograd) {
  for (int step = 0; step < 2; ++step) { // a budget has a plan in the second
    const WithLogDet expected = run(plain);
    const WithLogDet found = run(flow);
    EXPECT_LT(relative_error(found.output, expected.output), kGradientFloat64);
    EXPECT_LT(
        relative_error(found.log_det, expected.log_det), kGradientFloat64);
    EXPECT_EQ(found.log_det.sizes(), at::IntArrayRef({2}));
    EXPECT_EQ(found.log_det.scalar_type(), torch::kDouble);
    EXPECT_LT(
        relative_error(
            gradients(loss_of(found), flow),
            gradients(loss_of(expected), plain)),
        kGradientFloat64);
  }
}

TEST_P(LogDets, SecondPassOfARetainedGraphIsAlike) {
  const Tensor loss = loss_of(run(flow));
  const auto first = gradients(loss, flow, /*retain_graph=*/true);
  const auto second = gradients(loss, flow);
  EXPECT_LT(relative_error(second, first), kGradientFloat64);
}

TEST_P(LogDets, SecondDerivativesEqualPlainAutograd) {
  const auto second = [&](memcnn::ReversibleSequence& sequence) {
    const Tensor loss = loss_of(run(sequence));
    Tensor penalty = 0.3 * loss;
    for (const Tensor& gradient : gradients(loss, sequence, true, true)) {
      if (gradient.defined()) {
        penalty = penalty + gradient.square().sum();
      }
    }
    return gradients(penalty, sequence);
  };
  EXPECT_LT(
      relative_error(second(flow), second(plain)), kSecondDerivativeFloat64);
}

TEST_P(LogDets, GoBackOnlyAsFarAsAskedFor) {
  const auto last = [&](memcnn::ReversibleSequence& sequence) {
    const size_t i =
        direction() == Direction::kForward ? sequence->size() - 2 : 0;
    return torch::autograd::grad(
        {loss_of(run(sequence))}, sequence->ptr(i)->parameters());
  };
  EXPECT_LT(relative_error(last(flow), last(plain)), kGradientFloat64);
}

TEST(LogDetsOfChains, EqualThoseOfJacobians) {
  torch::manual_seed(6);
  memcnn::ReversibleSequence flow = make_flow(6);
  const Tensor x = torch::randn({2, kChannels, 2, 2}, torch::kDouble);
  const auto given = flow->given(
      {torch::randn({2, 2, 2, 2}, torch::kDouble),
       torch::randn({2, 3, 2, 2}, torch::kDouble)});
  const auto [y, log_det] = given.forward_with_log_det(x);
  EXPECT_LT(
      relative_error(
          log_det,
          log_det_of_jacobian(
              [&](const Tensor& at) { return given.forward(at); }, x)),
      kGradientFloat64);
  const auto [again, minus] = given.inverse_with_log_det(y);
  EXPECT_LT(relative_error(again, x), kGradientFloat64);
  EXPECT_LT(relative_error(minus, -log_det), kGradientFloat64);
  EXPECT_LT(
      relative_error(
          minus,
          log_det_of_jacobian(
              [&](const Tensor& at) { return given.inverse(at); }, y)),
      kGradientFloat64);
}

TEST(LogDetsOfChains, AreTheSumOfThoseOfTheBlocks) {
  memcnn::ReversibleSequence flow;
  Scaled scaled(kChannels);
  memcnn::AffineCoupling coupling(
      memcnn::AffineAdapterSigmoid(WideBranch(2)), memcnn::Unchanged());
  flow->push_back(scaled);
  flow->push_back(coupling);
  const Tensor x = torch::randn({3, kChannels, 2, 2});
  const WithLogDet first = scaled->forward_with_log_det(x);
  const WithLogDet second = coupling->forward_with_log_det(first.output);
  EXPECT_LT(
      relative_error(
          flow->forward_with_log_det(x).log_det,
          first.log_det + second.log_det),
      kRoundTripFloat32);
}

TEST(LogDetsOfChains, PassGradcheckTwice) {
  memcnn::ReversibleSequence flow = make_flow(6);
  const Tensor x = leaf({2, kChannels, 2, 2});
  const Tensor c = leaf({2, 2, 2, 2});
  const Tensor c2 = leaf({2, 3, 2, 2});
  std::vector<Tensor> leaves = flow->parameters();
  leaves.insert(leaves.end(), {x, c, c2});
  const auto both = [&] {
    const auto [z, log_det] = flow->given({c, c2}).forward_with_log_det(x);
    return torch::cat({z.flatten(), log_det});
  };
  EXPECT_TRUE(gradcheck(both, leaves));
  EXPECT_TRUE(gradcheck(
      [&] {
        const torch::AutoGradMode with_graph(true);
        const Tensor values = both();
        const auto gradients = torch::autograd::grad(
            {values.square().sum()}, leaves, {}, true, true, true);
        Tensor all = gradients[0].flatten();
        for (size_t i = 1; i < gradients.size(); ++i) {
          all = torch::cat({all, gradients[i].flatten()});
        }
        return all;
      },
      leaves));
}

/// What a step of a flow of this depth holds after forward, in bytes.
int64_t held(int depth, bool with_log_det, int64_t anchor_every = 0) {
  memcnn::ReversibleSequence flow(
      memcnn::ReversibleSequenceOptions().anchor_every(anchor_every));
  torch::manual_seed(7);
  for (int i = 0; i < depth; ++i) {
    flow->push_back(memcnn::AffineCoupling(
        memcnn::AffineAdapterSigmoid(WideBranch(2)), memcnn::Unchanged()));
    flow->push_back(Flipped());
  }
  const Tensor x = torch::randn({8, kChannels, 16, 16});
  const memcnn::AllocationMeter meter;
  const WithLogDet result = with_log_det
      ? flow->forward_with_log_det(x)
      : WithLogDet{flow->forward(x), Tensor()};
  return meter.held_bytes();
}

constexpr int64_t kStreamBytes = 8 * kChannels * 16 * 16 * 4;

TEST(LogDetsOfChains, Rule1HoldFourBytesASample) {
  EXPECT_EQ(held(5, true), held(5, false) + 4 * 8);
  EXPECT_LT(held(50, true) - held(5, true), kStreamBytes);
}

TEST(LogDetsOfChains, Rule2MayBeWrittenInPlace) {
  memcnn::ReversibleSequence flow = make_flow(6);
  const Tensor x = leaf({2, kChannels, 3, 3});
  const std::vector<Tensor> given = {
      torch::randn({2, 2, 3, 3}, torch::kDouble),
      torch::randn({2, 3, 3, 3}, torch::kDouble)};
  const auto gradient = [&](bool in_place) {
    auto [z, log_det] = flow->given(given).forward_with_log_det(x);
    const Tensor prior = -0.5 * z.square().flatten(1).sum(1);
    Tensor sum = in_place ? log_det += prior : log_det + prior;
    return torch::autograd::grad({(sum * sum).sum()}, {x});
  };
  EXPECT_LT(relative_error(gradient(true), gradient(false)), kGradientFloat64);
}

TEST(LogDetsOfChains, ReachAHalfThatAKeptBlockDependsOnAlone) {
  // log |det J| of a one-sided coupling is a function of one half alone: the
  // other one of a kept graph has no gradient.
  const memcnn::ReversibleSequenceOptions all_kept =
      memcnn::ReversibleSequenceOptions().memory_budget(100'000'000);
  torch::manual_seed(9);
  const auto branch = [] {
    return memcnn::AffineAdapterTanh(WideBranch(2));
  };
  const memcnn::AffineCoupling first(branch(), memcnn::Unchanged());
  const memcnn::AffineCoupling second(memcnn::Unchanged(), branch());
  for (const memcnn::AnyInvertible& coupling :
       {memcnn::AnyInvertible(first), memcnn::AnyInvertible(second)}) {
    memcnn::ReversibleSequence kept(all_kept, coupling);
    memcnn::ReversibleSequence flow(Flipped(), kept);
    flow->to(torch::kDouble);
    const Tensor x = leaf({2, kChannels, 3, 3});
    const auto gradient = [&] {
      const Tensor log_det = flow->forward_with_log_det(x).log_det;
      return torch::autograd::grad({log_det.square().sum()}, {x});
    };
    const auto found = gradient();
    const memcnn::PlainAutogradGuard plain;
    EXPECT_LT(relative_error(found, gradient()), kGradientFloat64);
  }
}

TEST(LogDetsOfChains, CountBlocksThatLearnNothing) {
  memcnn::ReversibleSequence flow = make_flow(6);
  const Tensor x = torch::randn({2, kChannels, 3, 3}, torch::kDouble);
  const std::vector<Tensor> given = {
      torch::randn({2, 2, 3, 3}, torch::kDouble),
      torch::randn({2, 3, 3, 3}, torch::kDouble)};
  const Tensor expected = flow->given(given).forward_with_log_det(x).log_det;
  for (size_t i = 0; i < 4; ++i) {
    for (Tensor& parameter : flow->ptr(i)->parameters()) {
      parameter.requires_grad_(false);
    }
  }
  const Tensor found = flow->given(given).forward_with_log_det(x).log_det;
  EXPECT_TRUE(found.requires_grad());
  EXPECT_LT(relative_error(found, expected), kGradientFloat64);
}

TEST(LogDetsOfChains, AreZerosOfWhatKeepsVolumes) {
  memcnn::ReversibleSequence flow(
      Flipped(), memcnn::AdditiveCoupling(SmoothBranch(2)));
  memcnn::InvertibleModuleWrapper wrapped(flow);
  const Tensor x = torch::randn({3, kChannels, 2, 2}).requires_grad_();
  for (const Tensor& log_det :
       {flow->forward_with_log_det(x).log_det,
        wrapped->inverse_with_log_det(x * 1).log_det}) {
    EXPECT_TRUE(log_det.equal(torch::zeros({3})));
    EXPECT_FALSE(log_det.requires_grad());
  }
}

TEST(LogDetsOfChains, AreInFloat32OfNarrowStreams) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    memcnn::ReversibleSequence flow;
    torch::manual_seed(8);
    flow->push_back(
        memcnn::AffineCoupling(memcnn::AffineAdapterSigmoid(WideBranch(2))));
    flow->push_back(
        memcnn::AffineCoupling(memcnn::AffineAdapterTanh(WideBranch(2))));
    const Tensor x = torch::randn({2, kChannels, 3, 3});
    const Tensor expected = flow->forward_with_log_det(x).log_det;
    flow->to(dtype);
    const auto [z, log_det] =
        flow->forward_with_log_det(x.to(dtype).requires_grad_());
    EXPECT_EQ(z.scalar_type(), dtype);
    EXPECT_EQ(log_det.scalar_type(), torch::kFloat);
    EXPECT_LT(relative_error(log_det, expected), kRoundTripBFloat16);
    (z.sum() + log_det.sum()).backward();
    for (const Tensor& parameter : flow->parameters()) {
      EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
    }
  }
}

TEST(LogDetsOfChains, Rule3CostNothingWhereNobodyAsks) {
  memcnn::ReversibleSequence flow;
  flow->push_back(memcnn::AffineCoupling(
      memcnn::AffineAdapterSigmoid(WideBranch(2)), memcnn::Unchanged()));
  const std::vector<std::string> names = operators_of([&] {
    flow->forward(torch::randn({2, kChannels, 4, 4}));
  });
  for (const std::string& name : names) {
    EXPECT_THAT(name, testing::Not(HasSubstr("log")));
    EXPECT_THAT(name, testing::Not(HasSubstr("sum")));
  }
  EXPECT_FALSE(names.empty());
}

TEST(LogDetsOfChains, NeedBlocksThatHaveOne) {
  memcnn::ReversibleSequence inner{Flipped(), Silent()};
  memcnn::ReversibleSequence flow(Scaled(kChannels), inner);
  const Tensor x = torch::randn({2, kChannels, 2, 2});
  EXPECT_NO_THROW(flow->forward(x));
  const auto message = AllOf(
      HasSubstr("SilentImpl::forward_with_log_det(): expected a module with a "
                "log-determinant"),
      HasSubstr("block 1 (ReversibleSequence)"),
      HasSubstr("PreservesVolume"));
  EXPECT_THAT(
      [&] { flow->forward_with_log_det(x); },
      ThrowsError<c10::ValueError>(message));
  const torch::NoGradGuard no_grad;
  EXPECT_THAT(
      [&] { flow->forward_with_log_det(x); },
      ThrowsError<c10::ValueError>(message));
  memcnn::InvertibleModuleWrapper wrapped{Silent()};
  EXPECT_THAT(
      [&] { wrapped->inverse_with_log_det(x); },
      ThrowsError<c10::ValueError>(
          HasSubstr("SilentImpl::inverse_with_log_det(): expected a module "
                    "with a log-determinant")));
}

/// Sums over too little.
struct WrongSumImpl final : torch::nn::Cloneable<WrongSumImpl> {
  void reset() override {}
  Tensor forward(const Tensor& x) {
    return 2 * x;
  }
  Tensor inverse(const Tensor& y) {
    return y / 2;
  }
  WithLogDet forward_with_log_det(const Tensor& x) {
    return {2 * x, torch::full_like(x, 2).log()};
  }
  WithLogDet inverse_with_log_det(const Tensor& y) {
    return {y / 2, Tensor()};
  }
};
TORCH_MODULE(WrongSum);

TEST(LogDetsOfChains, OfUsersAreOneASample) {
  memcnn::ReversibleSequence flow{WrongSum()};
  const Tensor x = torch::randn({3, kChannels, 2, 2});
  EXPECT_THAT(
      [&] { flow->forward_with_log_det(x); },
      ThrowsError<c10::ValueError>(
          HasSubstr("WrongSumImpl::forward_with_log_det(): expected a "
                    "log-determinant for each of the 3 samples"),
          HasSubstr("block 0"),
          HasSubstr("[3, 4, 2, 2]")));
  EXPECT_THAT(
      [&] { flow->inverse_with_log_det(x); },
      ThrowsError<c10::ValueError>(HasSubstr("undefined")));
}

TEST(LogDetsOfChains, NeedSamplesInDimensionZero) {
  memcnn::AffineCoupling coupling(
      memcnn::AffineAdapterSigmoid(LinearBranch(4, 4)),
      memcnn::CouplingOptions().split_dim(0));
  EXPECT_THAT(
      [&] {
        coupling->forward_with_log_det(torch::randn({4, 4}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "AffineCoupling::forward_with_log_det(): expected a split_dim other "
          "than the samples', 0")));
  memcnn::AdditiveCoupling from_the_end(
      LinearBranch(4), memcnn::CouplingOptions().split_dim(-2));
  EXPECT_THAT(
      [&] {
        from_the_end->inverse_with_log_det(torch::randn({4, 4}));
      },
      ThrowsError<c10::ValueError>(HasSubstr("split_dim")));
  EXPECT_THAT(
      [&] { from_the_end->inverse_with_log_det(torch::tensor(1.0)); },
      ThrowsError<c10::ValueError>(HasSubstr("dim 0, the samples")));
}

TEST(Conditions, Rule4AreKeptAsTheyAre) {
  memcnn::ReversibleSequence flow;
  torch::manual_seed(8);
  for (int i = 0; i < 4; ++i) {
    flow->push_back(memcnn::AdditiveCoupling(ConditionalBranch(2, 2, 2)));
  }
  const Tensor x = torch::randn({8, kChannels, 16, 16});
  Tensor c = torch::randn({8, 2, 16, 16}).requires_grad_();
  Tensor y;
  {
    const memcnn::AllocationMeter meter;
    y = flow->given({c}).forward(x);
    EXPECT_EQ(meter.held_bytes(), kStreamBytes) << "conditions were copied";
  }
  torch::autograd::grad({y.sum()}, {c}, {}, /*retain_graph=*/true);
  {
    const torch::NoGradGuard no_grad;
    c.add_(1);
  }
  EXPECT_THAT(
      [&] { torch::autograd::grad({y.sum()}, {c}); },
      ThrowsError<c10::Error>(HasSubstr(
          "expected the conditions that it was given to be unchanged")));
}

/// Multiplies by a matrix of a condition, about, for each 1x1 image.
struct MixedImpl final : torch::nn::Cloneable<MixedImpl> {
  explicit MixedImpl(double sigma) {
    const Tensor noise = torch::randn({kChannels, kChannels}, torch::kDouble);
    matrix = register_buffer(
        "matrix",
        std::get<0>(torch::linalg_qr(noise)) +
            sigma * torch::randn({kChannels, kChannels}, torch::kDouble));
    undo = register_buffer("undo", torch::inverse(matrix));
  }
  void reset() override {}
  Tensor forward(const Tensor& x) {
    return torch::einsum("oc,nchw->nohw", {matrix, x});
  }
  Tensor inverse(const Tensor& y) {
    return torch::einsum("oc,nchw->nohw", {undo, y});
  }

  Tensor matrix;
  Tensor undo;
};
TORCH_MODULE(Mixed);

/// Gradients of a chain whose inverses lose digits, in float32, are far from
/// those in float64, and near to them with anchors.
void anchors_keep_gradients(bool nested, bool create_graph) {
  torch::manual_seed(9);
  memcnn::ReversibleSequence flow;
  for (int i = 0; i < 30; ++i) {
    flow->push_back(Mixed(0.25));
    flow->push_back(memcnn::AdditiveCoupling(SmoothBranch(2)));
  }
  memcnn::ReversibleSequence outer = flow;
  if (nested) {
    outer = memcnn::ReversibleSequence(memcnn::AnyInvertible(flow), Flipped());
  }
  const Tensor x = torch::randn({2, kChannels, 3, 3});
  const auto gradients = [&](torch::ScalarType dtype, int64_t anchor_every) {
    outer->to(dtype);
    flow->options.anchor_every(anchor_every);
    auto found = torch::autograd::grad(
        {outer->forward(x.to(dtype)).square().mean()},
        flow->parameters(),
        /*grad_outputs=*/{},
        /*retain_graph=*/create_graph,
        create_graph);
    for (Tensor& gradient : found) {
      gradient = gradient.detach();
    }
    return found;
  };
  const auto expected = gradients(torch::kDouble, 1);
  const double without = relative_error(gradients(torch::kFloat, 0), expected);
  const double with = relative_error(gradients(torch::kFloat, 4), expected);
  EXPECT_GT(without, 2e-3) << "the chain loses too little to show anything";
  EXPECT_LT(with, 2e-4);
}

TEST(Anchors, Rule5KeepGradientsWhereInversesLoseDigits) {
  anchors_keep_gradients(/*nested=*/false, /*create_graph=*/false);
}

TEST(Anchors, Rule5KeepThemInsideOfAnotherSequence) {
  anchors_keep_gradients(/*nested=*/true, /*create_graph=*/false);
}

TEST(Anchors, Rule5KeepThoseThatHaveAGraph) {
  anchors_keep_gradients(/*nested=*/false, /*create_graph=*/true);
  anchors_keep_gradients(/*nested=*/true, /*create_graph=*/true);
}

TEST(Anchors, Rule5TakeOneStreamEach) {
  // 20 blocks: after the 6th, the 12th and the 18th.
  EXPECT_EQ(held(10, true, 6), held(10, true) + 3 * kStreamBytes);
  // What the last block returns is kept in any case.
  EXPECT_EQ(held(10, true, 20), held(10, true));
  EXPECT_EQ(held(10, true, 10), held(10, true) + kStreamBytes);
}

TEST(Anchors, AreNoNegativeNumber) {
  memcnn::ReversibleSequence flow(
      memcnn::ReversibleSequenceOptions().anchor_every(-1), Flipped());
  EXPECT_THAT(
      [&] {
        flow->forward(torch::randn({2, 4, 2, 2}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "ReversibleSequence::forward(): expected anchor_every of at least 0 "
          "blocks, but got -1")));
}

TEST(Anchors, ArePrinted) {
  memcnn::ReversibleSequence flow(
      memcnn::ReversibleSequenceOptions().anchor_every(3), Flipped());
  std::ostringstream stream;
  stream << *flow;
  EXPECT_THAT(stream.str(), HasSubstr("anchor_every=3"));
}

} // namespace
} // namespace memcnn_test
