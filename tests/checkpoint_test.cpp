// SPDX-License-Identifier: MIT

#include "support/modules.h"
#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

/// Down-sampling: it has no inverse.
torch::nn::Sequential down_sampling() {
  return torch::nn::Sequential(
      torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 6, 3).stride(2).padding(1)),
      torch::nn::BatchNorm2d(6),
      torch::nn::ReLU(torch::nn::ReLUOptions().inplace(true)),
      torch::nn::Dropout(0.3));
}

class Checkpoint : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    module_->to(torch::kDouble);
  }

  std::vector<torch::Tensor> sources(const torch::Tensor& x) const {
    std::vector<torch::Tensor> all = module_->parameters();
    all.push_back(x);
    return all;
  }

  torch::nn::Sequential module_ = down_sampling();
};

TEST_F(Checkpoint, GradientsBuffersAndRandomNumbersEqualPlainOnes) {
  torch::nn::Sequential twin(
      std::dynamic_pointer_cast<torch::nn::SequentialImpl>(module_->clone()));
  const torch::Tensor x = leaf({2, 4, 6, 6});
  torch::manual_seed(7);
  module_->forward(x * 1).square().sum().backward();
  const torch::Tensor expected = x.grad().clone();
  x.mutable_grad() = torch::Tensor();
  torch::manual_seed(7);
  memcnn::checkpoint(twin, x * 1).square().sum().backward();
  EXPECT_TRUE(x.grad().equal(expected));
  EXPECT_TRUE(all_equal(twin->buffers(), module_->buffers()));
  for (size_t i = 0; i < twin->parameters().size(); ++i) {
    EXPECT_TRUE(
        twin->parameters()[i].grad().equal(module_->parameters()[i].grad()));
  }
}

TEST_F(Checkpoint, KeepsTheInputAndNothingElse) {
  const torch::Tensor x = leaf({2, 4, 6, 6});
  memcnn::AllocationMeter meter;
  torch::Tensor input = x * 1;
  const auto input_bytes = static_cast<int64_t>(input.nbytes());
  const torch::Tensor y = memcnn::checkpoint(module_, input);
  input = torch::Tensor();
  // Dropout draws: one generator state, and the output.
  EXPECT_LE(
      meter.held_bytes(),
      input_bytes + static_cast<int64_t>(y.nbytes()) + 5200);
  y.sum().backward();
}

TEST_F(Checkpoint, TakesEveryKindOfHolderAndOptions) {
  const torch::Tensor x = leaf({2, 4, 6, 6});
  module_->eval();
  const torch::Tensor expected = module_->forward(x);
  torch::nn::Conv2d conv(torch::nn::Conv2dOptions(4, 6, 3));
  conv->to(torch::kDouble);
  torch::nn::AnyModule any(conv);
  EXPECT_TRUE(memcnn::checkpoint(module_, x).equal(expected));
  EXPECT_TRUE(memcnn::checkpoint(conv, x).equal(conv(x)));
  EXPECT_TRUE(memcnn::checkpoint(any, x).equal(conv(x)));
  EXPECT_TRUE(
      memcnn::checkpoint(
          memcnn::CheckpointOptions().preserve_rng_state(false), module_, x)
          .equal(expected));
}

/// Two tensors and a mask in, a tuple out.
struct GateImpl final : torch::nn::Cloneable<GateImpl> {
  GateImpl() {
    reset();
  }
  void reset() override {
    weight = register_parameter("weight", torch::full({1}, 2., torch::kDouble));
  }
  std::tuple<torch::Tensor, torch::Tensor>
  forward(torch::Tensor a, torch::Tensor b, torch::Tensor mask) {
    return {torch::where(mask, a * weight, b), b.sum()};
  }
  torch::Tensor weight;
};
TORCH_MODULE(Gate);

TEST_F(Checkpoint, SeveralInputsAndOutputs) {
  Gate gate;
  const torch::Tensor a = leaf({3, 4});
  const torch::Tensor b = leaf({3, 4});
  const torch::Tensor mask = torch::rand({3, 4}) > 0.5;
  const auto loss = [](const auto& outputs) {
    return std::get<0>(outputs).pow(3).sum() * std::get<1>(outputs);
  };
  const auto expected = torch::autograd::grad(
      {loss(gate->forward(a * 1, b * 1, mask))}, {a, b, gate->weight});
  const auto found = torch::autograd::grad(
      {loss(memcnn::checkpoint(gate, a * 1, b * 1, mask))},
      {a, b, gate->weight});
  EXPECT_TRUE(all_equal(found, expected));
}

TEST_F(Checkpoint, RetainedGraphsAndSecondDerivatives) {
  SmoothBranch smooth(4);
  smooth->to(torch::kDouble);
  const torch::Tensor x = leaf({2, 4, 3, 3});
  std::vector<torch::Tensor> all = smooth->parameters();
  all.push_back(x);
  const auto second = [&](const torch::Tensor& y) {
    const auto first = torch::autograd::grad(
        {y.pow(3).sum()},
        all,
        {},
        /*retain_graph=*/true,
        /*create_graph=*/true);
    return torch::autograd::grad({first.back().square().sum()}, all);
  };
  EXPECT_LT(
      relative_error(
          second(memcnn::checkpoint(smooth, x * 1)), second(smooth(x * 1))),
      kGradientFloat64);

  const torch::Tensor y = memcnn::checkpoint(smooth, x * 1).sum();
  const auto once = torch::autograd::grad({y}, all, {}, /*retain_graph=*/true);
  EXPECT_TRUE(all_equal(torch::autograd::grad({y}, all), once));
  EXPECT_THAT(
      [&] { torch::autograd::grad({y}, all); },
      ThrowsError<c10::Error>(
          HasSubstr("checkpoint(): expected one backward pass")));
}

TEST_F(Checkpoint, InputChangedInPlaceIsAnError) {
  torch::Tensor input = leaf({2, 4, 6, 6}) * 1;
  const torch::Tensor y = memcnn::checkpoint(module_, input);
  input.add_(1);
  EXPECT_THAT(
      [&] { y.sum().backward(); },
      ThrowsError<c10::Error>(HasSubstr(
          "checkpoint(): expected the inputs that it keeps to be unchanged")));
}

TEST_F(Checkpoint, ExceptionsPassThrough) {
  Throwing forward(4, /*throw_in_run=*/1);
  Throwing backward(4, /*throw_in_run=*/2);
  const torch::Tensor x = leaf({3, 4}, torch::kFloat);
  EXPECT_THROW(memcnn::checkpoint(forward, x), std::domain_error);
  const torch::Tensor y = memcnn::checkpoint(backward, x);
  EXPECT_THROW(y.sum().backward(), std::domain_error);
}

TEST_F(Checkpoint, WithoutAGraphItIsThePlainCall) {
  const torch::NoGradGuard no_grad;
  module_->eval();
  const torch::Tensor x = torch::randn({2, 4, 6, 6}, torch::kDouble);
  const torch::Tensor y = memcnn::checkpoint(module_, x);
  EXPECT_TRUE(y.equal(module_->forward(x)));
  EXPECT_EQ(y.grad_fn(), nullptr);
}

} // namespace
} // namespace memcnn_test
