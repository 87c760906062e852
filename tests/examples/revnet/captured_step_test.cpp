// SPDX-License-Identifier: MIT

#include "revnet/captured_step.h"

#include "revnet/fused_sgd.h"
#include "revnet/revnet.h"
#include "support/cuda_graph_test.h"
#include "support/throws_error.h"

#include <memcnn/plain_autograd.h>

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using memcnn_test::ThrowsError;
using revnet::CapturedStep;
using revnet::CapturedStepOptions;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;
using testing::StrEq;
using torch::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kWarmUp = 3;

CapturedStepOptions few() {
  return CapturedStepOptions().warm_up(kWarmUp);
}

// --- on any device ----------------------------------------------------------

TEST(CapturedStep, RunsEagerlyOnACpu) {
  int calls = 0;
  CapturedStep step(
      torch::kCPU,
      [&](const Tensors& inputs) {
        ++calls;
        return Tensors{2 * inputs[0]};
      },
      few());
  for (int64_t i = 0; i < 2 * kWarmUp; ++i) {
    const auto input = torch::full({2}, i);
    EXPECT_TRUE(torch::equal(step({input})[0], 2 * input));
  }
  EXPECT_EQ(calls, 2 * kWarmUp);
  EXPECT_FALSE(step.is_captured());
}

TEST(CapturedStep, NeedsNoInputs) {
  CapturedStep step(
      torch::kCPU, [](const Tensors&) { return Tensors{torch::ones({1})}; });
  EXPECT_EQ(step()[0].item<double>(), 1);
  EXPECT_EQ(step({})[0].item<double>(), 1);
}

TEST(CapturedStep, GivesOutputsWithoutTheirGraph) {
  const auto weight = torch::ones({2}).requires_grad_();
  CapturedStep step(
      torch::kCPU, [&](const Tensors&) { return Tensors{weight.exp()}; });
  EXPECT_FALSE(step()[0].requires_grad());
}

TEST(CapturedStep, PassesOnWhatAStepThrows) {
  bool fails = true;
  CapturedStep step(torch::kCPU, [&](const Tensors& inputs) {
    if (fails) {
      throw std::runtime_error("full moon");
    }
    return inputs;
  });
  EXPECT_THAT(
      [&] { step({torch::ones({1})}); },
      testing::ThrowsMessage<std::runtime_error>(StrEq("full moon")));
  fails = false;
  EXPECT_EQ(step({torch::ones({1})})[0].item<double>(), 1);
}

/// A step that takes what its first call brings: one float32 matrix.
CapturedStep step_of_a_matrix() {
  CapturedStep step(torch::kCPU, [](const Tensors& inputs) { return inputs; });
  step({torch::ones({4, 3})});
  return step;
}

TEST(CapturedStep, RejectsOtherSizes) {
  auto step = step_of_a_matrix();
  EXPECT_THAT(
      [&] {
        step({torch::ones({2, 3})});
      },
      ThrowsError<c10::ValueError>(
          StrEq("CapturedStep::operator(): expected input 0 to be, as in the "
                "first call, float of sizes [4, 3], but got float of sizes "
                "[2, 3]. Make a CapturedStep for each kind of input.")));
  EXPECT_EQ(step({torch::ones({4, 3})})[0].sum().item<double>(), 12);
}

TEST(CapturedStep, RejectsAnotherDtype) {
  auto step = step_of_a_matrix();
  EXPECT_THAT(
      [&] {
        step({torch::ones({4, 3}, torch::kInt64)});
      },
      ThrowsError<c10::ValueError>(HasSubstr("but got long int of sizes")));
}

TEST(CapturedStep, TakesTheKindsOfTheFirstCallThatWorked) {
  CapturedStep step(torch::kCPU, [](const Tensors& inputs) { return inputs; });
  EXPECT_THROW(step({torch::ones({4}, torch::kMeta)}), c10::ValueError);
  EXPECT_EQ(step({torch::ones({3})})[0].sum().item<double>(), 3);
}

TEST(CapturedStep, RejectsAnotherNumberOfInputs) {
  auto step = step_of_a_matrix();
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::ValueError>(StrEq(
          "CapturedStep::operator(): expected 1 inputs as in the first call, "
          "but got 0. Make a CapturedStep for each number of inputs.")));
}

TEST(CapturedStep, RejectsInputsOfAnotherDevice) {
  auto step = step_of_a_matrix();
  EXPECT_THAT(
      [&] {
        step({torch::ones({4, 3}, torch::kMeta)});
      },
      ThrowsError<c10::ValueError>(
          StrEq("CapturedStep::operator(): expected inputs on cpu, but got one "
                "on meta.")));
}

TEST(CapturedStep, RejectsAnUndefinedInput) {
  CapturedStep step(torch::kCPU, [](const Tensors& inputs) { return inputs; });
  EXPECT_THAT(
      [&] { step({Tensor()}); },
      ThrowsError<c10::ValueError>(
          StrEq("CapturedStep::operator(): expected inputs on cpu, but got one "
                "undefined.")));
}

TEST(CapturedStep, RejectsOutputsThatAReplayWouldNotWrite) {
  for (const auto& [output, told] :
       {std::pair(torch::ones({1}, torch::kMeta), "on meta"),
        std::pair(Tensor(), "undefined")}) {
    CapturedStep step(torch::kCPU, [output = output](const Tensors&) {
      return Tensors{torch::ones({1}), output};
    });
    EXPECT_THAT(
        [&] { step(); },
        ThrowsError<c10::ValueError>(StrEq(c10::str(
            "CapturedStep::operator(): expected outputs on cpu, but got "
            "one ",
            told,
            "."))));
  }
}

TEST(CapturedStep, RejectsAWarmUpOfNoCalls) {
  EXPECT_THAT(
      [] {
        CapturedStep(torch::kCPU, nullptr, CapturedStepOptions().warm_up(0));
      },
      ThrowsError<c10::ValueError>(
          StrEq("CapturedStep::CapturedStep(): expected warm_up to be 1 or "
                "more, but got 0.")));
}

// --- on a GPU ---------------------------------------------------------------

const torch::Device kGpu(torch::kCUDA, 0);

class CapturedStepCuda : public memcnn_test::CudaGraphTest {
 protected:
  /// Warms the step up.
  static void warm_up(CapturedStep& step, const Tensors& inputs = {}) {
    for (int64_t i = 0; i < kWarmUp; ++i) {
      step(inputs);
    }
  }

  /// Everything that a capture gone wrong would have spoilt.
  static void expect_usable_gpu() {
    const auto drawn = torch::rand({1000}, kGpu);
    EXPECT_LT(drawn.max().item<double>(), 1.0001);
    CapturedStep other(
        kGpu,
        [](const Tensors&) { return Tensors{torch::rand({3}, kGpu)}; },
        few());
    warm_up(other);
    other();
    EXPECT_TRUE(other.is_captured());
    EXPECT_EQ(other()[0].cpu().numel(), 3);
  }
};

TEST_F(CapturedStepCuda, RunsTheFunctionNoMoreOnceCaptured) {
  int calls = 0;
  CapturedStep step(
      kGpu,
      [&](const Tensors& inputs) {
        ++calls;
        return Tensors{inputs[0] + 1};
      },
      few());
  for (int64_t i = 0; i < 3 * kWarmUp; ++i) {
    EXPECT_EQ(step.is_captured(), i > kWarmUp) << i;
    step({torch::full({4}, i, kGpu)});
  }
  EXPECT_EQ(calls, kWarmUp + 1);
  EXPECT_GT(step.graph_bytes(), 0);
}

TEST_F(CapturedStepCuda, ReadsTheInputsOfEachCall) {
  CapturedStep step(
      kGpu,
      [](const Tensors& inputs) { return Tensors{inputs[0] + 1}; },
      few());
  for (int64_t i = 0; i < 3 * kWarmUp; ++i) {
    EXPECT_EQ(step({torch::full({4}, i, kGpu)})[0][2].item<int64_t>(), i + 1);
  }
}

TEST_F(CapturedStepCuda, RunsEagerlyIfNotEnabled) {
  int calls = 0;
  CapturedStep step(
      kGpu,
      [&](const Tensors& inputs) {
        ++calls;
        return inputs;
      },
      few().enabled(false));
  for (int64_t i = 0; i < 2 * kWarmUp; ++i) {
    step({torch::ones({1}, kGpu)});
  }
  EXPECT_EQ(calls, 2 * kWarmUp);
  EXPECT_FALSE(step.is_captured());
}

TEST_F(CapturedStepCuda, RejectsAnotherBatchSize) {
  CapturedStep step(
      kGpu,
      [](const Tensors& inputs) { return Tensors{inputs[0].sum()}; },
      few());
  const Tensors batch{torch::ones({8, 3}, kGpu)};
  warm_up(step, batch);
  step(batch);
  EXPECT_THAT(
      [&] {
        step({torch::ones({5, 3}, kGpu)});
      },
      ThrowsError<c10::ValueError>(
          HasSubstr("float of sizes [8, 3], but got float of sizes [5, 3].")));
  EXPECT_EQ(step(batch)[0].numel(), 1);
}

TEST_F(CapturedStepCuda, SaysThatAStepReadsAValueOnTheHost) {
  CapturedStep step(
      kGpu,
      [](const Tensors& inputs) {
        const auto noise = torch::rand_like(inputs[0]);
        return Tensors{noise * inputs[0].sum().item<double>()};
      },
      few());
  const Tensors batch{torch::ones({8}, kGpu)};
  warm_up(step, batch);
  EXPECT_THAT(
      [&] { step(batch); },
      ThrowsError<c10::Error>(AllOf(
          StartsWith("CapturedStep::operator(): expected a step that a CUDA "
                     "graph can hold, but got, while it was captured: "),
          HasSubstr(" Take out of the step what waits for the GPU, pins memory "
                    "or sets another stream, such as item(), cpu() and "
                    "printing, or set enabled(false)."))));
  EXPECT_FALSE(step.is_captured());
  expect_usable_gpu();
  EXPECT_THAT(
      [&] { step(batch); },
      ThrowsError<c10::Error>(StrEq(
          "CapturedStep::operator(): expected a step whose graph works, but got "
          "one that failed in an earlier call. Make another CapturedStep.")));
}

TEST_F(CapturedStepCuda, SaysWhatAStepThrewWhileItWasCaptured) {
  int calls = 0;
  CapturedStep step(
      kGpu,
      [&](const Tensors&) {
        if (++calls > kWarmUp) {
          throw std::runtime_error("full moon.");
        }
        return Tensors{torch::rand({3}, kGpu)};
      },
      few());
  warm_up(step);
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::Error>(HasSubstr("while it was captured: full moon.")));
  expect_usable_gpu();
}

TEST_F(CapturedStepCuda, SaysThatAStepDoesNothingWhereItIsCaptured) {
  Tensor count = torch::zeros({1}, kGpu);
  CapturedStep step(
      kGpu,
      [&](const Tensors&) {
        const c10::impl::VirtualGuardImpl cuda(torch::kCUDA);
        const c10::StreamGuard elsewhere(cuda.getDefaultStream(kGpu));
        return Tensors{count.add_(1)};
      },
      few());
  warm_up(step);
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::Error>(
          HasSubstr("no work on the stream that it was given.")));
  expect_usable_gpu();
}

TEST_F(CapturedStepCuda, RejectsACaptureWithinAnother) {
  const auto draw = [](const Tensors&) {
    return Tensors{torch::rand({3}, kGpu)};
  };
  CapturedStep step(
      kGpu,
      [&](const Tensors&) {
        CapturedStep inner(kGpu, draw, few());
        warm_up(inner);
        return inner();
      },
      few());
  warm_up(step);
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::Error>(
          HasSubstr("while it was captured: another around it.")));
  expect_usable_gpu();
}

TEST_F(CapturedStepCuda, LetsOtherThreadsPinMemory) {
  CapturedStep step(
      kGpu,
      [](const Tensors&) {
        std::thread([] {
          torch::empty({1 << 20}, torch::TensorOptions().pinned_memory(true));
        }).join();
        return Tensors{torch::ones({3}, kGpu)};
      },
      few());
  warm_up(step);
  EXPECT_EQ(step()[0].sum().item<double>(), 3);
}

/// A step that from one of its calls on wants more memory than any GPU has.
CapturedStep greedy_from(int64_t call) {
  return CapturedStep(
      kGpu,
      [call, calls = int64_t{0}](const Tensors&) mutable {
        const int64_t size = ++calls < call ? 1 : int64_t{1} << 50;
        return Tensors{torch::empty({size}, kGpu)};
      },
      few());
}

TEST_F(CapturedStepCuda, RunsOutOfMemoryInWarmUp) {
  auto step = greedy_from(1);
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::OutOfMemoryError>(
          StartsWith("CapturedStep::operator(): expected enough memory for "
                     "warm-up on cuda:0, but got: CUDA out of memory.")));
  expect_usable_gpu();
}

TEST_F(CapturedStepCuda, RunsOutOfMemoryInCapture) {
  auto step = greedy_from(kWarmUp + 1);
  warm_up(step);
  EXPECT_THAT(
      [&] { step(); },
      ThrowsError<c10::OutOfMemoryError>(AllOf(
          StartsWith("CapturedStep::operator(): expected enough memory for "
                     "capture on cuda:0, but got: CUDA out of memory."),
          HasSubstr(" Lower what a step needs, such as its batch, or set "
                    "enabled(false): a graph has memory of its own."))));
  expect_usable_gpu();
}

// Whole training steps, whose kernels are deterministic.

/// How the blocks of a network run; none: all under plain autograd.
using EngineOrPlain = std::optional<revnet::Engine>;

class CapturedTrainingCuda : public CapturedStepCuda {
 protected:
  void SetUp() override {
    CapturedStepCuda::SetUp();
    at::globalContext().setDeterministicCuDNN(true);
  }
  void TearDown() override {
    at::globalContext().setDeterministicCuDNN(false);
  }

  /// A network with its optimiser and one step of training.
  struct Training {
    explicit Training(revnet::Engine engine = revnet::Engine::kSequence)
        : net(revnet::named("revnet38").engine(engine)),
          optimizer(
              on_gpu(*net).parameters(),
              torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(1e-4)) {}

    static revnet::RevNetImpl& on_gpu(revnet::RevNetImpl& net) {
      net.to(kGpu);
      return net;
    }
    Tensors operator()(const Tensors& batch) {
      optimizer.zero_grad();
      const auto loss = torch::cross_entropy_loss(net(batch[0]), batch[1]);
      loss.backward();
      optimizer.step(revnet::not_finite(loss));
      return {loss};
    }

    revnet::RevNet net;
    revnet::FusedSgd optimizer;
  };

  static Tensors batch() {
    return {
        torch::randn({16, 3, 32, 32}, kGpu),
        torch::randint(10, {16}, torch::device(kGpu).dtype(torch::kInt64))};
  }

  static Tensors copies(const Tensors& tensors) {
    Tensors found;
    for (const Tensor& tensor : tensors) {
      found.push_back(tensor.detach().clone());
    }
    return found;
  }

  static void expect_equal(const Tensors& a, const Tensors& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_TRUE(torch::equal(a[i], b[i])) << i;
    }
  }

  static std::vector<double> losses(EngineOrPlain engine, bool captured) {
    torch::manual_seed(1);
    const auto plain = engine
        ? std::nullopt
        : std::make_optional<memcnn::PlainAutogradGuard>();
    Training training(engine.value_or(revnet::Engine::kSequence));
    CapturedStep step(kGpu, training, few().enabled(captured));
    std::vector<double> found;
    for (int i = 0; i < 20; ++i) {
      found.push_back(step(batch())[0].item<double>());
    }
    return found;
  }
};

TEST_F(CapturedTrainingCuda, HasTheLossesOfEagerSteps) {
  for (const EngineOrPlain engine :
       {EngineOrPlain(),
        EngineOrPlain(revnet::Engine::kSequence),
        EngineOrPlain(revnet::Engine::kWrapper)}) {
    SCOPED_TRACE(engine ? static_cast<int>(*engine) : -1);
    EXPECT_EQ(losses(engine, true), losses(engine, false));
  }
}

TEST_F(CapturedTrainingCuda, FollowsTheLearningRate) {
  Training training;
  CapturedStep step(kGpu, std::ref(training), few());
  warm_up(step, batch());
  step(batch());
  const auto before = copies(training.net->parameters());
  training.optimizer.set_lr(0);
  step(batch());
  expect_equal(training.net->parameters(), before);
  training.optimizer.set_lr(0.1);
  step(batch());
  EXPECT_FALSE(torch::equal(training.net->parameters()[0], before[0]));
}

TEST_F(CapturedTrainingCuda, ChangesNothingIfTheLossIsNotFinite) {
  Training training;
  CapturedStep step(kGpu, std::ref(training), few());
  warm_up(step, batch());
  step(batch());
  const auto before = copies(training.net->parameters());
  const auto momentum = copies(training.optimizer.momentum_buffers());
  auto spoilt = batch();
  spoilt[0].fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(step(spoilt)[0].isnan().item<bool>());
  expect_equal(training.net->parameters(), before);
  expect_equal(training.optimizer.momentum_buffers(), momentum);
}

TEST_F(CapturedTrainingCuda, RejectsALearningRateSetInTheStep) {
  Training training;
  CapturedStep step(
      kGpu,
      [&](const Tensors& inputs) {
        training.optimizer.set_lr(0.01);
        return training(inputs);
      },
      few());
  warm_up(step, batch());
  EXPECT_THAT(
      [&] { step(batch()); },
      ThrowsError<c10::Error>(HasSubstr(
          "FusedSgd::set_lr(): expected a call outside of a captured step, but "
          "got one while it is captured. Set the learning rate before the "
          "step.")));
  expect_usable_gpu();
}

} // namespace
