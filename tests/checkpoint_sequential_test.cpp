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

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace memcnn_test {
namespace {

namespace nn = torch::nn;
using testing::ElementsAre;
using testing::HasSubstr;
using Options = memcnn::CheckpointSequentialOptions;

constexpr int64_t kLayers = 5;
constexpr int64_t kBytes = 64 * 64 * 4; // of what a layer saves

/// Layers that save their result, and count their runs.
class CheckpointSequential : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    for (int64_t i = 0; i < kLayers; ++i) {
      layers_->push_back(nn::Functional([this, i](const torch::Tensor& x) {
        ++runs_[static_cast<size_t>(i)];
        return x.tanh();
      }));
    }
  }

  /// How often each layer ran in a step.
  std::vector<int> runs(const Options& options) {
    runs_.assign(kLayers, 0);
    memcnn::checkpoint_sequential(options, layers_, x_).sum().backward();
    return runs_;
  }

  torch::Tensor x_ = leaf({64, 64}, torch::kFloat);
  nn::Sequential layers_;
  std::vector<int> runs_ = std::vector<int>(kLayers);
};

/// One of everything that a second run has to repeat.
nn::Sequential network() {
  torch::manual_seed(1);
  const auto relu = nn::ReLUOptions().inplace(true);
  const auto conv = nn::Conv2dOptions(4, 4, 3).padding(1);
  nn::Sequential layers(
      nn::Conv2d(conv),
      nn::BatchNorm2d(4),
      nn::ReLU(relu),
      nn::Dropout(0.3),
      nn::Conv2d(conv),
      nn::BatchNorm2d(4),
      nn::Tanh(),
      nn::Conv2d(conv));
  layers->to(torch::kDouble);
  return layers;
}

TEST_F(CheckpointSequential, AllButTheLastSegmentRunAgain) {
  EXPECT_THAT(runs(Options().segments(1)), ElementsAre(1, 1, 1, 1, 1));
  EXPECT_THAT(runs(Options().segments(2)), ElementsAre(2, 2, 1, 1, 1));
  EXPECT_THAT(runs(Options().segments(5)), ElementsAre(2, 2, 2, 2, 1));
  EXPECT_THAT(runs(Options()), ElementsAre(2, 2, 1, 1, 1)); // sqrt(5)
}

TEST_F(CheckpointSequential, GradientsBuffersAndRandomNumbersEqualPlainOnes) {
  const torch::Tensor x = leaf({2, 4, 6, 6});
  const auto step = [&](const auto& run) {
    nn::Sequential layers = network();
    torch::manual_seed(7);
    run(layers, x * 1).square().sum().backward();
    std::vector<torch::Tensor> result = layers->buffers();
    for (const torch::Tensor& parameter : layers->parameters()) {
      result.push_back(parameter.grad());
    }
    result.push_back(x.grad().clone());
    x.mutable_grad() = torch::Tensor();
    return result;
  };
  const auto expected = step([](nn::Sequential& layers, const auto& input) {
    return layers->forward(input);
  });
  for (const int64_t segments : {1, 2, 5}) {
    for (const int64_t budget : {-1, 0, 4000, 1 << 20}) {
      for (const bool debug : {false, true}) {
        Options options = Options().segments(segments).debug(debug);
        if (budget >= 0) {
          options.memory_budget(budget);
        }
        const auto found = step([&](nn::Sequential& layers, const auto& input) {
          return memcnn::checkpoint_sequential(options, layers, input);
        });
        EXPECT_TRUE(all_equal(found, expected))
            << segments << " segments, budget " << budget;
      }
    }
  }
}

TEST_F(CheckpointSequential, BudgetKeepsTheLastSegmentsThatFit) {
  const auto with = [](int64_t budget) {
    return Options().segments(kLayers).memory_budget(budget);
  };
  EXPECT_THAT(runs(with(0)), ElementsAre(2, 2, 2, 2, 2));
  EXPECT_THAT(runs(with(kBytes - 1)), ElementsAre(2, 2, 2, 2, 2));
  EXPECT_THAT(runs(with(kBytes)), ElementsAre(2, 2, 2, 2, 1));
  EXPECT_THAT(runs(with(4 * kBytes - 1)), ElementsAre(2, 2, 1, 1, 1));
  EXPECT_THAT(runs(with(5 * kBytes)), ElementsAre(1, 1, 1, 1, 1));
}

TEST_F(CheckpointSequential, BudgetIsNeverExceeded) {
  for (const int64_t kept : {0, 1, 2, 4}) {
    const memcnn::AllocationMeter meter;
    const torch::Tensor y = memcnn::checkpoint_sequential(
        Options().segments(2).memory_budget(kept * kBytes), layers_, x_);
    // Segments of two and three layers; the second one's input, and y, which
    // it saves.
    const int64_t fits = kept >= 3 ? 3 : 0;
    EXPECT_EQ(meter.held_bytes(), kBytes + (fits > 0 ? fits : 1) * kBytes)
        << kept;
    // While a segment runs: its argument and its result, and the states of the
    // generator.
    EXPECT_LE(meter.peak_bytes(), (kept + 3) * kBytes + 5200) << kept;
  }
}

TEST_F(CheckpointSequential, KeptTensorsThatOthersChangeAreComputedAgain) {
  torch::Tensor y = memcnn::checkpoint_sequential(
      Options().segments(2).memory_budget(1 << 20), layers_, x_);
  y.mul_(2); // tanh saves its result
  y.sum().backward();
  const torch::Tensor found = x_.grad().clone();
  x_.mutable_grad() = torch::Tensor();
  (layers_->forward(x_) * 2).sum().backward();
  EXPECT_TRUE(found.equal(x_.grad()));
}

/// Saves tensors for a result that nobody uses, and whose memory the next ones
/// get.
struct WastefulImpl final : nn::Module {
  WastefulImpl() {
    up = register_module("up", nn::Linear(64, 1024));
    down = register_module("down", nn::Linear(1024, 64));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor h = up(x);
    x.tanh();
    return down(h.tanh());
  }
  nn::Linear up{nullptr}, down{nullptr};
};
TORCH_MODULE(Wasteful);

TEST_F(CheckpointSequential, ABudgetHoldsWhereSavedTensorsDieInForward) {
  nn::Sequential layers;
  for (int i = 0; i < 6; ++i) {
    layers->push_back(Wasteful());
  }
  const int64_t kept_by_one = 64 * 1024 * 4; // the result of tanh
  for (const int64_t budget : {kept_by_one - 1, 2 * kept_by_one}) {
    const memcnn::AllocationMeter meter;
    const torch::Tensor y = memcnn::checkpoint_sequential(
        Options().segments(6).memory_budget(budget), layers, x_);
    const int64_t inputs = 6 * x_.nbytes(); // of 5 segments, and y
    const int64_t states = 64 << 10;
    EXPECT_LE(meter.held_bytes() - inputs, budget + states);
    EXPECT_GE(meter.held_bytes() - inputs, budget / kept_by_one * kept_by_one);
  }
}

TEST_F(CheckpointSequential, RetainedGraphsAndSecondDerivatives) {
  for (const int64_t budget : {0, 1 << 20}) {
    const auto options = Options().segments(2).memory_budget(budget);
    const torch::Tensor y =
        memcnn::checkpoint_sequential(options, layers_, x_ * 1).pow(3).sum();
    const auto grad = [&](const torch::Tensor& of, bool create_graph) {
      return torch::autograd::grad({of}, {x_}, {}, true, create_graph)[0];
    };
    const torch::Tensor once = grad(y, /*create_graph=*/false);
    EXPECT_TRUE(grad(y, /*create_graph=*/false).equal(once));
    const torch::Tensor expected = layers_->forward(x_ * 1).pow(3).sum();
    EXPECT_LT(
        relative_error(
            grad(grad(y, true).square().sum(), false),
            grad(grad(expected, true).square().sum(), false)),
        kGradientFloat32);
  }
}

/// Two tensors in, one out.
struct SumImpl final : nn::Module {
  torch::Tensor forward(torch::Tensor a, torch::Tensor b) {
    return a.tanh() + b;
  }
};
TORCH_MODULE(Sum);

/// One tensor in, two out.
struct TwiceImpl final : nn::Module {
  std::tuple<torch::Tensor, torch::Tensor> forward(torch::Tensor x) {
    return {x, x};
  }
};
TORCH_MODULE(Twice);

TEST_F(CheckpointSequential, TheFirstModuleMayTakeSeveralTensors) {
  nn::Sequential layers{Sum(), nn::Tanh(), nn::Tanh()};
  const torch::Tensor b = leaf({64, 64}, torch::kFloat);
  EXPECT_TRUE(memcnn::checkpoint_sequential(layers, 3, x_, b)
                  .equal(layers->forward(x_, b)));
}

TEST_F(CheckpointSequential, SeveralTensorsBetweenSegmentsAreAnError) {
  nn::Sequential layers{nn::Tanh(), Twice(), nn::Tanh()};
  EXPECT_THAT(
      [&] { memcnn::checkpoint_sequential(layers, 3, x_); },
      ThrowsError<c10::Error>(
          HasSubstr("checkpoint_sequential(): segment 1 (modules 1 to 1)")));
}

TEST_F(CheckpointSequential, InputChangedInPlaceNamesTheSegment) {
  const auto relu = nn::ReLUOptions().inplace(true);
  nn::Sequential layers{nn::Tanh(), nn::Tanh(), nn::ReLU(relu), nn::Tanh()};
  EXPECT_THAT(
      [&] {
        memcnn::checkpoint_sequential(
            Options().segments(2).memory_budget(0), layers, x_);
      },
      ThrowsError<c10::Error>(HasSubstr(
          "segment 1 (modules 2 to 3): expected the module to leave the inputs "
          "that are kept for backward as they are")));
}

/// Counts how often a message names the first segment of two.
size_t namings(const std::function<void()>& call) {
  const std::string place =
      "checkpoint_sequential(): segment 0 (modules 0 to 1)";
  std::string words;
  try {
    call();
  } catch (const c10::Error& error) {
    words = error.what_without_backtrace();
  }
  size_t count = 0;
  for (size_t at = words.find(place); at != std::string::npos;
       at = words.find(place, at + 1)) {
    ++count;
  }
  return count;
}

TEST_F(CheckpointSequential, ErrorsNameTheSegmentOnce) {
  const auto relu = nn::ReLUOptions().inplace(true);
  nn::Sequential in_place{nn::ReLU(relu), nn::Tanh(), nn::Tanh(), nn::Tanh()};
  const torch::Tensor x = x_ * 1;
  EXPECT_EQ(
      namings([&] { memcnn::checkpoint_sequential(in_place, 2, x); }), 1u);

  nn::Sequential narrow{
      nn::Tanh(), nn::Linear(3, 3), nn::Linear(3, 3), nn::Tanh()};
  EXPECT_EQ(namings([&] { memcnn::checkpoint_sequential(narrow, 2, x); }), 1u);
}

TEST_F(CheckpointSequential, ErrorsInBackwardNameTheSegmentOnce) {
  nn::BatchNorm1d norm(64);
  norm->eval();
  nn::Sequential layers{nn::Tanh(), norm, nn::Tanh(), nn::Tanh()};
  torch::Tensor y = memcnn::checkpoint_sequential(layers, 2, x_).sum();
  norm->running_mean.add_(1);
  EXPECT_EQ(namings([&] { y.backward(); }), 1u);

  y = memcnn::checkpoint_sequential(layers, 2, x_).sum();
  {
    const torch::NoGradGuard no_grad;
    norm->weight.add_(1);
  }
  EXPECT_EQ(namings([&] { y.backward(); }), 1u);
}

TEST_F(CheckpointSequential, WithoutAGraphItIsThePlainCall) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor y = memcnn::checkpoint_sequential(layers_, 2, x_);
  EXPECT_TRUE(y.equal(layers_->forward(x_)));
  EXPECT_EQ(y.grad_fn(), nullptr);
}

TEST_F(CheckpointSequential, RunsPlainlyUnderTheGuard) {
  const memcnn::PlainAutogradGuard plain;
  EXPECT_THAT(runs(Options().segments(5)), ElementsAre(1, 1, 1, 1, 1));
}

TEST_F(CheckpointSequential, RejectsOptionsOutOfRange) {
  const auto expect_error = [&](const Options& options, const char* words) {
    EXPECT_THAT(
        [&] { memcnn::checkpoint_sequential(options, layers_, x_); },
        ThrowsError<c10::ValueError>(HasSubstr(words)));
  };
  expect_error(Options().segments(0), "from 1 to 5 segments");
  expect_error(Options().segments(6), "but got 6");
  expect_error(Options().memory_budget(-1), "0 or more bytes, but got -1");
  EXPECT_THAT(
      [&] { memcnn::checkpoint_sequential(nn::Sequential(), 1, x_); },
      ThrowsError<c10::ValueError>(HasSubstr("at least one module")));
}

} // namespace
} // namespace memcnn_test
