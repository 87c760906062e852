// SPDX-License-Identifier: MIT
//
// OnPart and InverseOf, and the U-Net that they make.

#include "../support/flow_modules.h"
#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace memcnn_test {

using memcnn::Direction;
using testing::HasSubstr;

inline auto affine(int64_t channels) {
  return memcnn::AffineCoupling(
      memcnn::AffineAdapterSigmoid(WideBranch(channels / 2)),
      memcnn::AffineAdapterSigmoid(WideBranch(channels / 2)));
}

struct InverseOfCoupling {
  static constexpr const char* kName = "Coupling";
  static auto make() {
    return memcnn::InverseOf(affine(4));
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::InverseOf";
  }
};

MEMCNN_INVERTIBLE_SUITE(InverseOf, InverseOfCoupling);

struct OnPartCoupling {
  static constexpr const char* kName = "Coupling";
  static auto make() {
    return memcnn::OnPart(affine(4), 2);
  }
  static std::vector<int64_t> shape() {
    return {2, 6, 2, 2};
  }
  static std::string printed() {
    return "memcnn::OnPart(first_channel=2)";
  }
};

/// A sequence that holds another one.
struct OnPartNested {
  static constexpr const char* kName = "Nested";
  static auto make() {
    return memcnn::OnPart(
        memcnn::ReversibleSequence(
            affine(4), memcnn::OnPart(affine(2), 2), affine(4)),
        1);
  }
  static std::vector<int64_t> shape() {
    return {2, 5, 2, 2};
  }
  static std::string printed() {
    return "memcnn::OnPart(first_channel=1)";
  }
};

MEMCNN_INVERTIBLE_SUITE(OnPart, OnPartCoupling, OnPartNested);

namespace {

using Tensors = std::vector<torch::Tensor>;

class InverseOf : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }
};
class OnPart : public InverseOf {};
class UNet : public InverseOf {};

/// What plain autograd and a sequence make of a loss of both results, for a block
/// in its middle.
template <class Block>
void expect_plain_gradients(Block block, at::IntArrayRef sizes) {
  memcnn::ReversibleSequence sequence(
      affine(sizes[1]), std::move(block), affine(sizes[1]));
  sequence->to(torch::kDouble);
  for (const Direction direction : {Direction::kForward, Direction::kInverse}) {
    const torch::Tensor x = leaf(sizes);
    Tensors sources = sequence->parameters();
    sources.push_back(x);
    const auto gradients = [&](bool plain) {
      sequence->options.disable(plain);
      const auto [y, log_det] = map_with_log_det(*sequence, direction, x * 1);
      const torch::Tensor weights = 1 + 9 * torch::arange(x.size(0));
      return torch::autograd::grad(
          {y.pow(2).sum() + (weights * log_det).sum()}, sources);
    };
    const Tensors expected = gradients(/*plain=*/true);
    EXPECT_LT(relative_error(gradients(false), expected), kGradientFloat64)
        << memcnn::name_of(direction);
  }
}

TEST_F(InverseOf, ExchangesMapsAndSigns) {
  auto coupling = affine(4);
  memcnn::InverseOf inverse(coupling);
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  EXPECT_TRUE(inverse(x).equal(coupling->inverse(x)));
  EXPECT_TRUE(inverse->inverse(x).equal(coupling(x)));
  EXPECT_TRUE(inverse->forward_with_log_det(x).log_det.equal(
      coupling->inverse_with_log_det(x).log_det));
  EXPECT_TRUE(inverse->inverse_with_log_det(x).log_det.equal(
      coupling->forward_with_log_det(x).log_det));
  EXPECT_EQ(inverse->inner.ptr(), coupling.ptr());
}

TEST_F(InverseOf, TurnsModulesOfUsersRound) {
  memcnn::InverseOf scaled(Scaled(4));
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  EXPECT_LT(relative_error(scaled(x), Scaled(4)->inverse(x)), 1e-7);
  EXPECT_TRUE(scaled->forward_with_log_det(x).log_det.equal(
      -Scaled(4)->log_det(x).expand({2})));
  expect_plain_gradients(memcnn::InverseOf(Scaled(4)), {2, 4, 3, 3});
  EXPECT_THAT(
      [&] { memcnn::InverseOf(Silent())->forward_with_log_det(x); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected a module with a log-determinant")));
}

TEST_F(InverseOf, PassesConditionsOn) {
  memcnn::InverseOf inverse{ConditionalScale()};
  const torch::Tensor x = torch::randn({2, 4, 3, 3});
  const torch::Tensor c = torch::randn({2, 1, 3, 3});
  const auto [y, log_det] = inverse->given({c}).forward_with_log_det(x);
  EXPECT_TRUE(y.equal(ConditionalScale()->inverse(x, c)));
  EXPECT_TRUE(log_det.equal(-ConditionalScale()->log_det(x, c)));
}

TEST_F(InverseOf, OfASequenceSavesMemoryByItself) {
  memcnn::InverseOf inverse(memcnn::ReversibleSequence(affine(4), affine(4)));
  const torch::Tensor x = leaf({2, 4, 8, 8}, torch::kFloat);
  const auto held = [&](const auto& run) {
    const memcnn::AllocationMeter meter;
    const torch::Tensor y = run();
    return meter.held_bytes();
  };
  const int64_t one = 2 * 4 * 8 * 8 * 4;
  EXPECT_LT(held([&] { return inverse(x); }), 3 * one / 2);
  EXPECT_LT(
      held([&] { return inverse->inverse_with_log_det(x).output; }),
      3 * one / 2);
}

TEST_F(OnPart, IsSplitInnerAndCat) {
  auto coupling = affine(4);
  memcnn::OnPart part(coupling, 3);
  const torch::Tensor x = torch::randn({2, 7, 3, 3});
  const auto [y, log_det] = part->forward_with_log_det(x);
  const auto inner = coupling->forward_with_log_det(x.narrow(1, 3, 4));
  EXPECT_TRUE(y.equal(torch::cat({x.narrow(1, 0, 3), inner.output}, 1)));
  EXPECT_TRUE(log_det.equal(inner.log_det));
  EXPECT_TRUE(part(x).equal(y));
  EXPECT_LT(relative_error(part->inverse(y), x), kRoundTripFloat32);
  EXPECT_EQ(part->first_channel(), 3);
}

TEST_F(OnPart, LeavesItsInputAsItIs) {
  memcnn::OnPart part(affine(4), 3);
  const torch::NoGradGuard no_grad;
  const torch::Tensor x = torch::randn({1, 7, 3, 3});
  const torch::Tensor copy = x.clone();
  part(x);
  part->inverse(x);
  EXPECT_TRUE(x.equal(copy));
}

/// The part may lie in the second half, be all of it, or begin in the first.
TEST_F(OnPart, TakesHalvesAsWell) {
  for (const int64_t first : {6, 4, 2}) {
    memcnn::OnPart part(affine(8 - first), first);
    part->to(torch::kDouble);
    memcnn::Invertible& block = *part;
    ASSERT_TRUE(block.takes_halves_along(1));
    for (const Direction direction :
         {Direction::kForward, Direction::kInverse}) {
      const torch::Tensor x = torch::randn({2, 8, 3, 3}, torch::kDouble);
      const torch::Tensor grad = torch::randn({2, 8, 3, 3}, torch::kDouble);
      const auto back =
          [&](bool halves) {
            const torch::NoGradGuard no_grad;
            const auto form =
                [&](const torch::Tensor& whole) {
                  return halves ? Tensors{whole.narrow(1, 0, 4).clone(),
                                  whole.narrow(1, 4, 4).clone()}
                        : Tensors{whole.clone()};
                };
            memcnn::Recording recording = memcnn::Recording::start({});
            memcnn::AfterRun after;
            after.outputs = block.run(direction, form(x), recording);
            recording.replay_from_here();
            EXPECT_EQ(after.outputs.size(), halves ? 2u : 1u);
            after.grad_outputs = form(grad);
            after.kept_inputs.resize(after.outputs.size());
            after.needs_grad.assign(after.outputs.size(), true);
            memcnn::ParameterGradients none({}, {});
            const torch::Tensor y = torch::cat(after.outputs, 1);
            const memcnn::BeforeRun before = block.backward_step(
                direction, std::move(after), recording, none);
            return Tensors{
                y,
                torch::cat(before.inputs, 1),
                torch::cat(before.grad_inputs, 1)};
          };
      const Tensors whole = back(/*halves=*/false);
      EXPECT_TRUE(all_equal(back(/*halves=*/true), whole)) << first;
      EXPECT_LT(relative_error(whole[1], x), kRoundTripFloat64);
    }
  }
}

TEST_F(OnPart, LeavesTheHalfThatPassesInItsMemory) {
  const torch::NoGradGuard no_grad;
  memcnn::OnPart part(affine(2), 6);
  memcnn::Invertible& block = *part;
  memcnn::Recording off = memcnn::Recording::off();
  Tensors halves = {torch::randn({2, 4, 3, 3}), torch::randn({2, 4, 3, 3})};
  const void* first = halves[0].data_ptr();
  const void* second = halves[1].data_ptr();
  const Tensors result = block.run(Direction::kForward, std::move(halves), off);
  EXPECT_EQ(result[0].data_ptr(), first);
  EXPECT_EQ(result[1].data_ptr(), second);
}

TEST_F(OnPart, HasThePlainGradientsBetweenCouplings) {
  expect_plain_gradients(memcnn::OnPart(affine(4), 2), {2, 6, 3, 3});
  expect_plain_gradients(memcnn::OnPart(affine(2), 4), {2, 6, 3, 3});
  expect_plain_gradients(memcnn::OnPart(affine(4), 4), {2, 8, 3, 3});
  expect_plain_gradients(memcnn::OnPart(Scaled(3), 3), {2, 6, 3, 3});
  expect_plain_gradients(
      memcnn::InverseOf(memcnn::OnPart(Scaled(3), 3)), {2, 6, 3, 3});
}

TEST_F(OnPart, PassesConditionsOn) {
  memcnn::ReversibleSequence sequence(
      memcnn::OnPart(
          memcnn::ReversibleSequence(ConditionalScale(), affine(2)), 2),
      affine(4));
  sequence->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 3, 3});
  const torch::Tensor c = leaf({2, 1, 3, 3});
  Tensors sources = sequence->parameters();
  sources.insert(sources.end(), {x, c});
  const auto gradients = [&](bool plain) {
    sequence->options.disable(plain);
    const auto [y, log_det] = sequence->given({c}).forward_with_log_det(x * 1);
    const torch::Tensor weights = torch::tensor({1., 10.}, torch::kDouble);
    return torch::autograd::grad(
        {y.pow(2).sum() + (weights * log_det).sum()}, sources);
  };
  const Tensors expected = gradients(/*plain=*/true);
  EXPECT_LT(relative_error(gradients(false), expected), kGradientFloat64);
}

TEST_F(OnPart, RejectsChannelsThatAreNotThere) {
  EXPECT_THAT(
      [] { memcnn::OnPart part(affine(4), 0); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "OnPart::OnPart(): expected a first channel from 1 on, but got 0")));
  EXPECT_THAT(
      [] {
        memcnn::OnPart(affine(4), 4)(torch::ones({2, 4, 3, 3}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("OnPart::forward(): expected channels from 4 on in dim 1, "
                    "but got 4 channels (input sizes [2, 4, 3, 3]")));
  EXPECT_THAT(
      [] { memcnn::OnPart(affine(4), 4)(torch::ones(8)); },
      ThrowsError<c10::ValueError>(
          HasSubstr("OnPart::forward(): expected an input (N, C, *), samples "
                    "and then channels, but got sizes [8]")));
}

TEST_F(OnPart, RejectsAModuleThatChangesSizes) {
  EXPECT_THAT(
      [] {
        memcnn::OnPart(memcnn::Squeeze(2), 2)(torch::ones({2, 4, 4, 4}));
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("OnPart::forward(): expected the inner module, Squeeze, to "
                    "return what fits beside the other channels, sizes [2, 2, "
                    "4, 4], Float, cpu, but got sizes [2, 8, 2, 2]")));
}

/// Not invertible: inverse() returns other sizes.
struct NarrowingImpl final : torch::nn::Cloneable<NarrowingImpl> {
  void reset() override {}
  torch::Tensor forward(torch::Tensor x) {
    return 2 * x;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y.narrow(1, 0, 1);
  }
};
TORCH_MODULE(Narrowing);

TEST_F(OnPart, ComparesWhatTheModuleRebuilds) {
  memcnn::ReversibleSequence sequence(memcnn::OnPart(Narrowing(), 2));
  const torch::Tensor y = sequence(leaf({2, 4, 3, 3}, torch::kFloat) * 1);
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("block 0 (OnPart)"),
          HasSubstr(
              "to rebuild an input of sizes [2, 2, 3, 3], Float, cpu, but "
              "got sizes [2, 1, 3, 3]")));
}

/// Smooth, on volumes.
struct VolumeBranchImpl final : torch::nn::Cloneable<VolumeBranchImpl> {
  explicit VolumeBranchImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    conv = register_module(
        "conv",
        torch::nn::Conv3d(
            torch::nn::Conv3dOptions(channels, channels, 3).padding(1)));
  }
  torch::Tensor forward(torch::Tensor x) {
    return torch::tanh(conv(x));
  }

  int64_t channels;
  torch::nn::Conv3d conv{nullptr};
};
TORCH_MODULE(VolumeBranch);

/// A U-Net on volumes: `depth` couplings on each side of a level, of which the
/// next one gets as many channels as make its own of blocks of 8 pixels.
memcnn::ReversibleSequence
unet(const std::vector<int64_t>& channels, size_t level, int64_t depth) {
  memcnn::ReversibleSequence sequence;
  const auto blocks = [&] {
    for (int64_t i = 0; i < depth; ++i) {
      sequence->push_back(
          memcnn::AdditiveCoupling(VolumeBranch(channels[level] / 2)));
    }
  };
  blocks();
  if (level + 1 < channels.size()) {
    const int64_t down = channels[level + 1] / 8;
    sequence->push_back(memcnn::OnPart(
        memcnn::ReversibleSequence(
            memcnn::Haar(),
            unet(channels, level + 1, depth),
            memcnn::InverseOf(memcnn::Squeeze({2, 2, 2}))),
        channels[level] - down));
    blocks();
  }
  return sequence;
}

TEST_F(UNet, HasThePlainGradients) {
  auto trunk = unet({4, 8, 16}, 0, 2);
  trunk->to(torch::kDouble);
  const torch::Tensor x = leaf({1, 4, 8, 4, 4});
  Tensors sources = trunk->parameters();
  sources.push_back(x);
  for (const Direction direction : {Direction::kForward, Direction::kInverse}) {
    const auto gradients = [&](bool plain) {
      trunk->options.disable(plain);
      const auto [y, log_det] = map_with_log_det(*trunk, direction, x * 1);
      EXPECT_TRUE(log_det.equal(torch::zeros({1}, torch::kDouble)));
      return torch::autograd::grad({y.pow(3).sum()}, sources);
    };
    const Tensors expected = gradients(/*plain=*/true);
    EXPECT_LT(relative_error(gradients(false), expected), kGradientFloat64)
        << memcnn::name_of(direction);
  }
  const torch::NoGradGuard no_grad;
  EXPECT_LT(relative_error(trunk->inverse(trunk(x)), x), 1e-13);
}

TEST_F(UNet, HoldsOneOutputWhateverItsDepth) {
  const auto held = [](int64_t depth) {
    auto trunk = unet({4, 8, 16}, 0, depth);
    const torch::Tensor x = leaf({1, 4, 16, 16, 16}, torch::kFloat);
    const memcnn::AllocationMeter meter;
    const torch::Tensor y = trunk(x);
    return meter.held_bytes();
  };
  const int64_t stream = 4 * 16 * 16 * 16 * 4;
  EXPECT_EQ(held(1), held(3));
  EXPECT_LE(held(3), stream);
}

TEST_F(UNet, PeaksAlikeWhateverItsDepth) {
  const auto peak = [](int64_t depth) {
    auto trunk = unet({4, 8, 16}, 0, depth);
    const torch::Tensor x = leaf({1, 4, 16, 16, 16}, torch::kFloat);
    int64_t gradients = 0;
    for (const torch::Tensor& parameter : trunk->parameters()) {
      gradients += static_cast<int64_t>(parameter.nbytes());
    }
    const memcnn::AllocationMeter meter;
    trunk(x).square().sum().backward();
    return meter.peak_bytes() - gradients;
  };
  const int64_t stream = 4 * 16 * 16 * 16 * 4;
  EXPECT_LT(peak(3) - peak(1), stream / 2);
}

} // namespace
} // namespace memcnn_test
