// SPDX-License-Identifier: MIT

#include "../support/flow_layer_checks.h"
#include "../support/invertible_suite.h"
#include "../support/modules.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {

using memcnn::Direction;
using testing::HasSubstr;
using torch::Tensor;

/// With parameters that do something.
memcnn::ActNorm made_act_norm(int64_t channels) {
  memcnn::ActNorm norm(channels);
  const torch::NoGradGuard no_grad;
  norm->bias.normal_();
  norm->log_scale.normal_().mul_(0.5);
  return norm;
}

struct ActNormImages {
  static constexpr const char* kName = "Images";
  static constexpr bool kUsesAutocast = false;
  static auto make() {
    return made_act_norm(4);
  }
  static std::vector<int64_t> shape() {
    return {2, 4, 3, 3};
  }
  static std::string printed() {
    return "memcnn::ActNorm(4)";
  }
};

struct ActNormVectors : ActNormImages {
  static constexpr const char* kName = "Vectors";
  static std::vector<int64_t> shape() {
    return {3, 4};
  }
};

MEMCNN_INVERTIBLE_SUITE(ActNorm, ActNormImages, ActNormVectors);

namespace {

/// The mean and the population's standard deviation of each channel.
std::pair<Tensor, Tensor> statistics(const Tensor& x) {
  const Tensor by_channel = x.transpose(0, 1).flatten(1).to(torch::kDouble);
  return {by_channel.mean(1), by_channel.std(1, /*unbiased=*/false)};
}

void expect_normal(const Tensor& y) {
  const auto [mean, deviation] = statistics(y);
  EXPECT_LT(mean.abs().max().item<double>(), 1e-5) << y.sizes();
  EXPECT_LT((deviation - 1).abs().max().item<double>(), 1e-4) << y.sizes();
}

Tensor shifted_batch(at::IntArrayRef sizes) {
  return 3 * torch::randn(sizes) + 2;
}

class ActNorm : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(3);
  }
};

TEST_F(ActNorm, BeginsAsTheIdentity) {
  const Tensor x = torch::randn({2, 4, 3});
  const auto [y, log_det] = memcnn::ActNorm(4)->forward_with_log_det(x);
  EXPECT_TRUE(y.equal(x));
  EXPECT_TRUE(log_det.equal(torch::zeros(2)));
}

TEST_F(ActNorm, HalvesEqualWhole) {
  memcnn::ActNorm norm = moved(memcnn::ActNorm(6));
  for (const Tensor& x : streams_of(6)) {
    halves_equal_whole(*norm, x);
  }
}

TEST_F(ActNorm, GradientsMatchPlainAutogradForEveryStream) {
  memcnn::ActNorm norm = moved(memcnn::ActNorm(6));
  for (const Tensor& x : streams_of(6)) {
    gradients_match_plain_autograd(norm, x);
  }
}

TEST_F(ActNorm, LogDetMatchesJacobianForEveryStream) {
  memcnn::ActNorm norm = moved(memcnn::ActNorm(3));
  for (const Tensor& x : streams_of(3)) {
    log_det_matches_jacobian(norm, x);
  }
}

TEST_F(ActNorm, WorksInPlaceWhereNobodyElseRefersToTheStream) {
  const torch::NoGradGuard no_grad;
  memcnn::ActNorm norm = made_act_norm(4);
  memcnn::Invertible& layer = *norm;
  memcnn::Recording off = memcnn::Recording::off();
  std::vector<Tensor> parts;
  parts.push_back(torch::randn({2, 4, 3}));
  const void* const memory = parts[0].data_ptr();
  parts = layer.run(Direction::kForward, std::move(parts), off);
  EXPECT_EQ(parts[0].data_ptr(), memory);

  const Tensor mine = torch::randn({2, 4, 3});
  const Tensor copy = mine.clone();
  norm(mine);
  EXPECT_TRUE(mine.equal(copy));
}

TEST_F(ActNorm, TakesStreamsNarrowerThanItsParameters) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    memcnn::ReversibleSequence flow(made_act_norm(4));
    const Tensor x = torch::randn({2, 4, 3}).to(dtype).requires_grad_();
    const auto [y, log_det] = flow->forward_with_log_det(x);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_EQ(log_det.scalar_type(), torch::kFloat);
    (y.sum() + log_det.sum()).backward();
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    for (const Tensor& parameter : flow->parameters()) {
      EXPECT_EQ(parameter.grad().scalar_type(), torch::kFloat);
    }
    EXPECT_LT(relative_error(flow->inverse(y), x), round_trip_tolerance(dtype));
  }
}

TEST_F(ActNorm, LearnsNothingThatIsFrozen) {
  memcnn::ActNorm norm = moved(memcnn::ActNorm(4));
  norm->bias.set_requires_grad(false);
  memcnn::ReversibleSequence flow(norm);
  const auto [y, log_det] =
      flow->forward_with_log_det(torch::randn({2, 4, 3}, torch::kDouble));
  (y.square().sum() + log_det.sum()).backward();
  EXPECT_FALSE(norm->bias.grad().defined());
  EXPECT_TRUE(norm->log_scale.grad().defined());
}

TEST_F(ActNorm, GradientOfTheLogDetAloneArrives) {
  memcnn::ActNorm norm = moved(memcnn::ActNorm(4));
  memcnn::ReversibleSequence flow(norm);
  const Tensor x = leaf({2, 4, 3});
  flow->forward_with_log_det(made_by_a_layer(x)).log_det.sum().backward();
  EXPECT_TRUE(norm->log_scale.grad().equal(
      torch::full({4}, 6, torch::kDouble))); // two samples of three pixels
  EXPECT_FALSE(norm->bias.grad().defined());
}

TEST_F(ActNorm, RejectsWhatIsNoStreamOfItsChannels) {
  memcnn::ActNorm norm(4);
  EXPECT_THAT(
      [&] {
        norm(torch::ones({2, 3, 5}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "ActNorm::forward(): expected an input (N, C, *) with C = 4 channels, "
          "but got 3 (input sizes [2, 3, 5], Float, cpu). Construct the layer "
          "with the channels of its input.")));
  EXPECT_THAT(
      [&] { norm->inverse(torch::ones(4)); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "ActNorm::inverse(): expected an input (N, C, *), samples and then "
          "channels, but got sizes [4], Float, cpu. Add the missing dimension "
          "with unsqueeze().")));
  EXPECT_THAT(
      [&] { norm(Tensor()); },
      ThrowsError<c10::ValueError>(HasSubstr("got an undefined one")));
  EXPECT_THAT(
      [] { memcnn::ActNorm(0); },
      ThrowsError<c10::ValueError>(HasSubstr(
          "ActNorm::ActNorm(): expected at least 1 channel, but got 0. Give it "
          "the size of dim 1 of its input.")));
}

class Initialize : public ActNorm {};

TEST_F(Initialize, SetsKnownValues) {
  memcnn::ActNorm norm(1);
  const Tensor x = torch::tensor({0., 4., 4., 0.}).view({2, 1, 1, 2});
  EXPECT_EQ(memcnn::initialize(norm, x), 1u);
  const auto [y, log_det] = norm->forward_with_log_det(x);
  EXPECT_TRUE(torch::allclose(y.flatten(), torch::tensor({-1., 1., 1., -1.})));
  EXPECT_TRUE(torch::allclose(log_det, torch::full({2}, -1.386294)));
  EXPECT_FLOAT_EQ(norm->bias.item<float>(), -2);
  EXPECT_NEAR(norm->log_scale.item<double>(), -0.693147, 1e-6);
}

TEST_F(Initialize, NormalisesStreamsOfEveryDimension) {
  for (const std::vector<int64_t>& sizes :
       {std::vector<int64_t>{9, 5},
        {3, 5, 7},
        {3, 5, 4, 4},
        {2, 5, 3, 3, 3},
        {1, 5, 8}}) {
    memcnn::ActNorm norm(5);
    const Tensor x = shifted_batch(sizes);
    EXPECT_EQ(memcnn::initialize(norm, x), 1u);
    expect_normal(norm(x));
  }
}

TEST_F(Initialize, LeavesTheScaleOfAConstantChannel) {
  memcnn::ActNorm norm(2);
  Tensor x = shifted_batch({3, 2, 5});
  x.select(1, 1).fill_(7);
  memcnn::initialize(norm, x);
  EXPECT_EQ(norm->log_scale[1].item<float>(), 0);
  EXPECT_TRUE(norm(x).select(1, 1).eq(0).all().item<bool>());
  // One sample of one value: nothing deviates.
  memcnn::ActNorm single(2);
  EXPECT_EQ(memcnn::initialize(single, torch::full({1, 2}, 3.f)), 1u);
  EXPECT_TRUE(single->log_scale.equal(torch::zeros(2)));
  EXPECT_TRUE(single(torch::full({1, 2}, 3.f)).equal(torch::zeros({1, 2})));
}

/// A branch that holds one, and a batch norm and a dropout before it.
struct NormedBranchImpl : torch::nn::Cloneable<NormedBranchImpl> {
  explicit NormedBranchImpl(int64_t channels_) : channels(channels_) {
    reset();
  }
  void reset() override {
    layers = register_module(
        "layers",
        torch::nn::Sequential(
            torch::nn::Conv2d(
                torch::nn::Conv2dOptions(channels, channels, 3).padding(1)),
            torch::nn::BatchNorm2d(channels),
            torch::nn::Dropout(0.5)));
    norm = register_module("norm", memcnn::ActNorm(channels));
  }
  Tensor forward(const Tensor& x) {
    seen = norm(layers->forward(x));
    return seen;
  }

  int64_t channels;
  torch::nn::Sequential layers{nullptr};
  memcnn::ActNorm norm{nullptr};
  Tensor seen;
};
TORCH_MODULE(NormedBranch);

TEST_F(Initialize, ReachesThoseInBranches) {
  NormedBranch f(2);
  memcnn::AdditiveCoupling coupling(f, NormedBranch(2));
  memcnn::ActNorm between(4);
  memcnn::InvertibleModuleWrapper<memcnn::ReversibleSequence> flow(
      memcnn::ReversibleSequence(between, coupling));
  const Tensor x = shifted_batch({3, 4, 5, 5});
  EXPECT_EQ(memcnn::initialize(flow, x), 3u);
  expect_normal(between(x));
  expect_normal(f->seen);
  EXPECT_GT(f->norm->bias.abs().max().item<double>(), 1e-3);
  // Set for good: the next batch finds them as they are.
  const Tensor bias = between->bias.detach().clone();
  flow(shifted_batch({3, 4, 5, 5})).sum().backward();
  EXPECT_TRUE(between->bias.equal(bias));
}

TEST_F(Initialize, LeavesTheRestOfTheModelAsItWas) {
  memcnn::ReversibleSequence flow(
      memcnn::AdditiveCoupling(NormedBranch(2), NormedBranch(2)));
  flow->at<memcnn::AdditiveCoupling<NormedBranch>::Impl>(0).g->eval();
  std::vector<Tensor> buffers;
  std::vector<int64_t> versions;
  for (const Tensor& buffer : flow->buffers()) {
    buffers.push_back(buffer.clone());
    versions.push_back(buffer._version());
  }
  torch::manual_seed(8);
  const Tensor next = torch::rand(3);
  torch::manual_seed(8);
  memcnn::initialize(flow, shifted_batch({3, 4, 5, 5}).detach());
  torch::manual_seed(8);
  const Tensor x = shifted_batch({3, 4, 5, 5});
  torch::manual_seed(8);
  memcnn::initialize(flow, x);
  EXPECT_TRUE(torch::rand(3).equal(next));
  EXPECT_TRUE(all_equal(flow->buffers(), buffers));
  for (size_t i = 0; i < versions.size(); ++i) {
    EXPECT_EQ(flow->buffers()[i]._version(), versions[i]);
  }
  EXPECT_TRUE(flow->is_training());
  EXPECT_FALSE(flow->at<memcnn::AdditiveCoupling<NormedBranch>::Impl>(0)
                   .g->is_training());
}

/// Uses one twice, on other values, and one not at all.
struct TwiceImpl : torch::nn::Module {
  TwiceImpl() {
    norm = register_module("norm", memcnn::ActNorm(2));
    unused = register_module("unused", memcnn::ActNorm(2));
  }
  Tensor forward(const Tensor& x) {
    first = norm(x);
    return norm(2 * x + 1);
  }

  memcnn::ActNorm norm{nullptr};
  memcnn::ActNorm unused{nullptr};
  Tensor first;
};
TORCH_MODULE(Twice);

TEST_F(Initialize, SetsEachByItsFirstRun) {
  Twice twice;
  EXPECT_EQ(memcnn::initialize(twice, shifted_batch({3, 2, 5})), 1u);
  expect_normal(twice->first);
  // What did not run is armed no longer.
  twice->unused(shifted_batch({3, 2, 5}));
  EXPECT_TRUE(twice->unused->bias.equal(torch::zeros(2)));
}

TEST_F(Initialize, SetsOneThatIsTurnedRound) {
  memcnn::ActNorm norm(3);
  memcnn::InverseOf turned(norm);
  const Tensor x = shifted_batch({4, 3, 5});
  EXPECT_EQ(memcnn::initialize(turned, x), 1u);
  expect_normal(turned(x));
}

TEST_F(Initialize, TakesModulesHoldersAndContainers) {
  const Tensor x = shifted_batch({3, 2, 5});
  memcnn::ActNorm norm(2);
  EXPECT_EQ(memcnn::initialize(*norm, x), 1u);
  EXPECT_EQ(memcnn::initialize(torch::nn::AnyModule(norm), x), 1u);
  torch::nn::Sequential both(norm, memcnn::ActNorm(2));
  EXPECT_EQ(memcnn::initialize(both, x), 2u);
  expect_normal(both->forward(x));
}

TEST_F(Initialize, PassesConditionsOn) {
  memcnn::ActNorm norm(4);
  memcnn::ReversibleSequence flow;
  flow->push_back(norm);
  flow->push_back(memcnn::AdditiveCoupling(
      ConditionalBranch(2, 3, 2), ConditionalBranch(2, 3, 2)));
  const Tensor x = shifted_batch({3, 4, 5, 5});
  EXPECT_EQ(memcnn::initialize(flow, x, {torch::randn({3, 3, 5, 5})}), 1u);
  expect_normal(norm(x));
}

/// Fails after its ActNorm has run.
struct FailingImpl : torch::nn::Module {
  FailingImpl() {
    first = register_module("first", memcnn::ActNorm(2));
    second = register_module("second", memcnn::ActNorm(2));
  }
  Tensor forward(const Tensor& x) {
    first(x);
    TORCH_CHECK(false, "on purpose");
    return second(x);
  }

  memcnn::ActNorm first{nullptr};
  memcnn::ActNorm second{nullptr};
};
TORCH_MODULE(Failing);

TEST_F(Initialize, LeavesNothingArmedWhereForwardThrows) {
  Failing failing;
  const Tensor x = shifted_batch({3, 2, 5});
  EXPECT_THAT(
      [&] { memcnn::initialize(failing, x); },
      ThrowsError<c10::Error>(HasSubstr("on purpose")));
  failing->second(x);
  EXPECT_TRUE(failing->second->bias.equal(torch::zeros(2)));
}

TEST_F(Initialize, RejectsAnEmptyBatch) {
  memcnn::ActNorm norm(4);
  EXPECT_THAT(
      [&] {
        memcnn::initialize(norm, torch::ones({0, 4, 3}));
      },
      ThrowsError<c10::ValueError>(HasSubstr(
          "memcnn::initialize(): expected a batch of some samples, but got "
          "sizes [0, 4, 3], Float, cpu. Pass the first batch of the training "
          "data.")));
  EXPECT_THAT(
      [&] { memcnn::initialize(norm, Tensor()); },
      ThrowsError<c10::ValueError>(HasSubstr("undefined tensor")));
}

} // namespace
} // namespace memcnn_test
