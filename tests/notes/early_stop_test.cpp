// SPDX-License-Identifier: MIT
//
// Note [Early stop], rule by rule.

#include "../support/modules.h"
#include "../support/probes.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace memcnn_test {
namespace {

namespace nn = torch::nn;
using testing::HasSubstr;

memcnn::CheckpointOptions early_stop(bool early_stop) {
  return memcnn::CheckpointOptions().early_stop(early_stop);
}

/// Counts its runs, saves nothing for backward.
nn::Functional counting(int& runs) {
  return nn::Functional([&runs](const torch::Tensor& x) {
    ++runs;
    return x + 1;
  });
}

class EarlyStop : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  /// Gradients of x and the parameters, of a module run by `run`.
  template <class Run, class Holder>
  std::vector<torch::Tensor> gradients(const Run& run, Holder module) {
    std::vector<torch::Tensor> sources = module->parameters();
    sources.push_back(x_);
    torch::manual_seed(2);
    return torch::autograd::grad({run(x_ * 1).square().sum()}, sources);
  }

  template <class Holder>
  void expect_as_plain(Holder module) {
    const auto expected = gradients(
        [&](const torch::Tensor& x) { return module->forward(x); }, module);
    const auto found = gradients(
        [&](const torch::Tensor& x) { return memcnn::checkpoint(module, x); },
        module);
    EXPECT_TRUE(all_equal(found, expected));
  }

  torch::Tensor x_ = leaf({5, 4}, torch::kFloat);
};

TEST_F(EarlyStop, Rule1EndsBeforeTheOperatorWhoseArgumentIsTheLastTensor) {
  int before = 0;
  int after = 0;
  nn::Sequential module(
      counting(before), nn::Linear(4, 4), counting(after), nn::Flatten());
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(before, 2);
  EXPECT_EQ(after, 1);
  memcnn::checkpoint(early_stop(false), module, x_).sum().backward();
  EXPECT_EQ(before, 4);
  EXPECT_EQ(after, 3);
  expect_as_plain(module);
}

TEST_F(EarlyStop, Rule1RunsNothingAgainWhereNothingIsSaved) {
  int runs = 0;
  nn::Sequential module(counting(runs), nn::Flatten());
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(runs, 1);
  EXPECT_TRUE(x_.grad().equal(torch::ones_like(x_)));
}

TEST_F(EarlyStop, Rule1HooksOfForwardFireOnce) {
  int fired = 0;
  nn::Sequential module(
      nn::Linear(4, 4),
      nn::Functional([&](const torch::Tensor& x) {
        x.register_hook([&](const torch::Tensor&) { ++fired; });
        return x.tanh();
      }),
      nn::Linear(4, 4));
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(fired, 1);
}

TEST_F(EarlyStop, Rule1OfACatchAllInForward) {
  nn::Sequential module(
      nn::Linear(4, 4), nn::Functional([](const torch::Tensor& x) {
        torch::Tensor y = x;
        try {
          y = x.tanh();
        } catch (...) {
        }
        return y;
      }));
  expect_as_plain(module);
}

TEST_F(EarlyStop, Rule2MemoryIsThatOfAFullSecondRun) {
  nn::Sequential module;
  for (int i = 0; i < 8; ++i) {
    module->push_back(nn::Functional(torch::tanh));
  }
  const torch::Tensor x = leaf({64, 64}, torch::kFloat);
  const auto bytes = static_cast<int64_t>(x.nbytes());
  const auto peak = [&](bool stops) {
    const memcnn::AllocationMeter meter;
    torch::Tensor y = memcnn::checkpoint(early_stop(stops), module, x);
    EXPECT_EQ(meter.held_bytes(), bytes); // y alone
    y.sum().backward();
    return meter.peak_bytes();
  };
  peak(false); // allocates the gradient
  const int64_t full = peak(false);
  EXPECT_LE(peak(true), full);
}

TEST_F(EarlyStop, Rule2TensorsAreLetGoAgainWhereTheGraphIsRetained) {
  nn::Sequential module{
      nn::Functional(torch::tanh), nn::Functional(torch::tanh)};
  const torch::Tensor x = leaf({64, 64}, torch::kFloat);
  const memcnn::AllocationMeter meter;
  const torch::Tensor y = memcnn::checkpoint(module, x).sum();
  const int64_t held = meter.held_bytes();
  const auto once = torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true);
  EXPECT_EQ(meter.held_bytes(), held + static_cast<int64_t>(x.nbytes()));
  EXPECT_TRUE(all_equal(torch::autograd::grad({y}, {x}), once));
}

TEST_F(EarlyStop, Rule3OperatorsThatWriteWhatTheySavedRunToTheirEnd) {
  expect_as_plain(nn::Sequential(nn::Linear(4, 4), nn::RReLU()));
  int runs = 0; // what writes first and saves then may be the last
  nn::Sequential in_place(
      nn::BatchNorm1d(4),
      nn::Linear(4, 4),
      nn::ReLU(nn::ReLUOptions().inplace(true)),
      counting(runs));
  memcnn::checkpoint(in_place, x_).sum().backward();
  EXPECT_EQ(runs, 1);
}

TEST_F(EarlyStop, Rule3MemoryThatWasWrittenAndFreedIsForgotten) {
  const auto memory = [](const torch::Tensor& tensor) {
    return tensor.storage().unsafeGetStorageImpl();
  };
  std::vector<float> twos(20, 2.F);
  int after = 0;
  nn::Sequential module(
      nn::Functional([&](const torch::Tensor& x) {
        const auto* freed = memory(torch::empty_like(x).fill_(1));
        // Allocators hand out what was just freed; sanitizers do so later.
        std::vector<torch::Tensor> scales;
        do {
          scales.push_back(torch::from_blob(twos.data(), {5, 4}));
        } while (memory(scales.back()) != freed && scales.size() < 100);
        return x * scales.back();
      }),
      counting(after));
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(after, 1);
}

TEST_F(EarlyStop, Rule4BuffersAndRandomNumbersOnBothSidesOfTheStop) {
  const auto make = [] {
    torch::manual_seed(1);
    return nn::Sequential(
        nn::Dropout(0.5),
        nn::BatchNorm1d(4),
        nn::Linear(4, 4),
        nn::Functional([](const torch::Tensor& x) { // saves nothing
          return x + torch::rand({4});
        }),
        nn::Functional([](const torch::Tensor& x) { return x.view({-1}); }));
  };
  nn::Sequential module = make();
  nn::Sequential twin = make();
  const auto expected = gradients(
      [&](const torch::Tensor& x) { return module->forward(x); }, module);
  const torch::Tensor next = torch::rand({1});
  const auto found = gradients(
      [&](const torch::Tensor& x) { return memcnn::checkpoint(twin, x); },
      twin);
  EXPECT_TRUE(all_equal(found, expected));
  EXPECT_TRUE(torch::rand({1}).equal(next));
  EXPECT_TRUE(all_equal(twin->buffers(), module->buffers()));
}

/// Writes its buffer, then scales and squares, then writes it again.
struct WritingImpl final : nn::Cloneable<WritingImpl> {
  WritingImpl() {
    reset();
  }
  void reset() override {
    level = register_buffer("level", torch::ones({1}));
  }
  torch::Tensor forward(torch::Tensor x) {
    if (before) {
      before();
    }
    torch::Tensor y = (x * level.clone()).square();
    level.add_(1);
    return y;
  }
  std::function<void()> before;
  torch::Tensor level;
};
TORCH_MODULE(Writing);

TEST_F(EarlyStop, Rule4WritesUntilTheStopAreThoseOfForward) {
  Writing module;
  module->before = [&] {
    module->level.mul_(3);
  };
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(module->level.item<float>(), 4);
  EXPECT_LT(relative_error(x_.grad(), 18 * x_.detach()), kGradientFloat32);

  int runs = 0;
  module->before = [&] {
    module->level.mul_(3);
    if (++runs > 1) {
      module->level.mul_(3);
    }
  };
  EXPECT_THAT(
      [&] { memcnn::checkpoint(module, x_).sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("to write in backward what it wrote in forward")));
  EXPECT_EQ(module->level.item<float>(), 13); // as forward left it
}

TEST_F(EarlyStop, Rule4DrawsUntilTheStopAreThoseOfForward) {
  int runs = 0;
  nn::Sequential module(
      nn::Functional([&](const torch::Tensor& x) {
        if (++runs > 1) {
          torch::rand({1});
        }
        return x * torch::rand({4});
      }),
      nn::Functional([](const torch::Tensor& x) { return x.tanh(); }));
  EXPECT_THAT(
      [&] { memcnn::checkpoint(module, x_).sum().backward(); },
      ThrowsError<c10::Error>(HasSubstr("to draw in backward")));
}

TEST_F(EarlyStop, Rule5AnotherTensorOrOneTooFewIsAnError) {
  int runs = 0;
  nn::Functional another([&](const torch::Tensor& x) {
    return ++runs == 1 ? x.tanh() : x.narrow(1, 0, 2).tanh();
  });
  EXPECT_THAT(
      [&] { memcnn::checkpoint(another, x_).sum().backward(); },
      ThrowsError<c10::Error>(AllOf(
          HasSubstr("to save in backward the tensors that it saved in forward"),
          HasSubstr("[5, 2]"),
          HasSubstr("[5, 4]"))));
  runs = 0;
  nn::Functional fewer([&](const torch::Tensor& x) {
    return ++runs == 1 ? x.tanh().tanh() : x.tanh();
  });
  EXPECT_THAT(
      [&] { memcnn::checkpoint(fewer, x_).sum().backward(); },
      ThrowsError<c10::Error>(HasSubstr("the 2 tensors that it saved in "
                                        "forward, but got 1")));
}

TEST_F(EarlyStop, Rule5ATensorChangedInPlaceIsAnError) {
  nn::Functional module(
      [](const torch::Tensor& x) { return x.tanh().mul_(2).tanh(); });
  EXPECT_THAT(
      [&] { memcnn::checkpoint(module, x_).sum().backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("what an operator saved for backward to be unchanged")));
}

TEST_F(EarlyStop, Rule6PartsThatSaveMemoryThemselves) {
  int runs = 0;
  nn::Sequential inner(counting(runs), nn::Linear(4, 4));
  nn::Sequential module(
      nn::Linear(4, 4),
      nn::Functional(
          [&](const torch::Tensor& x) { return memcnn::checkpoint(inner, x); }),
      nn::Functional(torch::tanh));
  module->register_module("inner", inner.ptr());
  expect_as_plain(module);
  runs = 0;
  memcnn::checkpoint(module, x_).sum().backward();
  EXPECT_EQ(runs, 3); // in each run of the module, and again for the inner one
}

TEST_F(EarlyStop, Rule6ParametersFrozenInBetween) {
  nn::Sequential module(nn::Linear(4, 4), nn::Tanh(), nn::Linear(4, 4));
  const std::vector<torch::Tensor> sources = {x_, module->parameters()[2]};
  const auto expected =
      torch::autograd::grad({module->forward(x_ * 1).sum()}, sources);
  const torch::Tensor y = memcnn::checkpoint(module, x_ * 1).sum();
  module->parameters()[0].set_requires_grad(false);
  EXPECT_TRUE(all_equal(torch::autograd::grad({y}, sources), expected));
}

TEST_F(EarlyStop, Rule7ResultsAfterTheLastTensorTakeNoBudget) {
  const int64_t result = x_.nbytes();
  const auto kept_of = [&](nn::Sequential module, int64_t budget) {
    const auto kept = std::make_shared<memcnn::KeptActivations>();
    memcnn::checkpoint(
        memcnn::CheckpointOptions().memory_budget(budget).kept(kept),
        module,
        x_);
    EXPECT_EQ(kept->bytes, kept->results * result);
    return *kept;
  };
  nn::Sequential module(nn::Linear(4, 4), nn::Tanh(), nn::Linear(4, 4));
  const memcnn::KeptActivations kept = kept_of(module, result);
  EXPECT_EQ(kept.results, 1u);
  EXPECT_EQ(kept.spared, kept.multiply_adds) << "of what would run again";
  EXPECT_EQ(kept_of(module, 2 * result).results, 1u);
  module->push_back(nn::RReLU()); // runs again as a whole
  EXPECT_EQ(kept_of(module, 2 * result).results, 2u);
}

TEST_F(EarlyStop, ABackwardPassInsideOfForwardIsAnError) {
  nn::Functional module([](const torch::Tensor& x) {
    torch::AutoGradMode with_graph(true);
    const torch::Tensor leaf = x.detach().requires_grad_();
    return x * torch::autograd::grad({leaf.tanh().sum()}, {leaf})[0];
  });
  EXPECT_THAT(
      [&] { memcnn::checkpoint(module, x_); },
      ThrowsError<c10::Error>(HasSubstr("set early_stop(false)")));
  memcnn::checkpoint(early_stop(false), module, x_).sum().backward();
  const torch::Tensor y = x_.detach().tanh();
  EXPECT_LT(relative_error(x_.grad(), 1 - y * y), kGradientFloat32);
}

/// Keeps a loss of its activation, as users do who add it later.
struct WithSideLossImpl final : nn::Module {
  explicit WithSideLossImpl(bool saves) : saves_(saves) {}
  torch::Tensor forward(const torch::Tensor& x) {
    loss = (saves_ ? x.tanh() : x).sum();
    return x.sigmoid();
  }
  torch::Tensor loss;

 private:
  bool saves_;
};
TORCH_MODULE(WithSideLoss);

TEST_F(EarlyStop, ALossThatForwardKeepsIsAnError) {
  for (const bool saves : {false, true}) {
    WithSideLoss module(saves);
    const torch::Tensor y = memcnn::checkpoint(module, x_);
    EXPECT_THAT(
        [&] { (y.sum() + module->loss).backward(); },
        ThrowsError<c10::Error>(HasSubstr("Return that tensor from forward")));
  }
}

/// Whose forward no exception may leave.
struct QuietImpl final : nn::Module {
  torch::Tensor forward(const torch::Tensor& x) noexcept {
    return x.tanh().sigmoid().flatten();
  }
};
TORCH_MODULE(Quiet);

TEST_F(EarlyStop, AForwardThatIsNoexceptRunsToItsEnd) {
  expect_as_plain(Quiet());
}

TEST_F(EarlyStop, AfterAnExceptionGraphsAreAsAlways) {
  Throwing forward(4, /*throw_in_run=*/1);
  Throwing backward(4, /*throw_in_run=*/2);
  EXPECT_THROW(memcnn::checkpoint(forward, x_), std::domain_error);
  EXPECT_THROW(
      memcnn::checkpoint(backward, x_).sum().backward(), std::domain_error);
  x_.tanh().sum().backward();
  const torch::Tensor y = x_.detach().tanh();
  EXPECT_TRUE(x_.grad().allclose(1 - y * y));
}

} // namespace
} // namespace memcnn_test
