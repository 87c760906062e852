// SPDX-License-Identifier: MIT
//
// Note [Graph capture], rule by rule. What is refused in a capture is tested
// with a capture that is pretended, too, so that it is where there is no GPU.

#include "../support/autocast.h"
#include "../support/cuda_graph_test.h"
#include "../support/modules.h"
#include "../support/pretended_capture.h"
#include "../support/throws_error.h"
#include "../support/tolerances.h"
#include "../support/twins.h"
#include "../support/ways.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <revnet/captured_step.h>
#include <revnet/fused_sgd.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

using revnet::CapturedStep;
using Tensors = std::vector<torch::Tensor>;

using Linears = memcnn::AdditiveCoupling<torch::nn::Linear, torch::nn::Linear>;

Linears linears(std::optional<int64_t> bits = std::nullopt) {
  return Linears(
      torch::nn::Linear(4, 4),
      torch::nn::Linear(4, 4),
      memcnn::CouplingOptions().fractional_bits(bits));
}

// Pretended captures.

// Rule 2: random numbers are replayed, or refused where they cannot be.

TEST(GraphCapture, Rule2OldGeneratorsAreRefused) {
  const PretendedCapture capture(3);
  memcnn::ReversibleSequence sequence(linears());
  EXPECT_NO_THROW(sequence(leaf({2, 8}, torch::kFloat)));
  PretendedCapture::facts().generators_are_open = false;
  EXPECT_THAT(
      [&] {
        sequence(leaf({2, 8}, torch::kFloat));
      },
      ThrowsError<c10::Error>(
          HasSubstr("memcnn: expected a LibTorch whose random numbers can be "
                    "replayed in a capture, which is 2.10 or later, but got"),
          HasSubstr("in capture 3 of cpu. Set preserve_rng_state(false) where "
                    "no branch draws, or run eagerly.")));
  sequence->options.preserve_rng_state(false);
  EXPECT_NO_THROW(sequence(leaf({2, 8}, torch::kFloat)).sum().backward());
}

// Rule 3: forward and backward are in one capture.

class CapturedNode : public testing::TestWithParam<Way> {};

INSTANTIATE_TEST_SUITE_P(Ways, CapturedNode, saving_ways(), way_name);

TEST_P(CapturedNode, Rule3BackwardInAnotherCaptureIsAnError) {
  torch::nn::AnyModule block = run_in(GetParam(), linears());
  const auto forward = [&] {
    return block.forward(leaf({2, 8}, torch::kFloat) * 1).sum();
  };
  const auto backward_in = [](memcnn::detail::CaptureId id, auto loss) {
    return [=] {
      const PretendedCapture capture(id);
      loss.backward();
    };
  };
  const torch::Tensor eager = forward();
  EXPECT_THAT(
      backward_in(3, eager),
      ThrowsError<c10::Error>(
          HasSubstr("forward ran, which was eager work, but got capture 3 "
                    "(cpu). Capture forward and backward as one graph, or run "
                    "both eagerly.")));
  torch::Tensor captured;
  {
    const PretendedCapture capture(3);
    captured = forward();
    EXPECT_NO_THROW(forward().backward());
  }
  EXPECT_THAT(
      backward_in(4, captured),
      ThrowsError<c10::Error>(
          HasSubstr("which was capture 3, but got capture 4 (cpu).")));
  EXPECT_THAT(
      [&] { captured.backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("which was capture 3, but got eager work (cpu).")));
}

// Rule 4: a capture frees what is its own.

TEST(GraphCapture, Rule4AnInputOfBeforeIsKept) {
  memcnn::InvertibleModuleWrapper block(linears());
  const torch::Tensor x = leaf({2, 8}, torch::kFloat);
  const auto reason_in = [&](bool is_of_this_capture) {
    const PretendedCapture capture(3);
    if (!is_of_this_capture) {
      PretendedCapture::facts().is_of_this_capture = [](const at::Tensor&) {
        return false;
      };
    }
    const torch::Tensor h = x * 1;
    block(h).sum().backward();
    return block->input_kept_because();
  };
  EXPECT_EQ(reason_in(true), "");
  EXPECT_EQ(
      reason_in(false),
      "it was made before the capture, and every replay reads it");
}

// Rule 5: what compares values on the host is refused.

TEST(GraphCapture, Rule5DebugIsRefused) {
  const PretendedCapture capture(3);
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions().debug(true), linears());
  EXPECT_THAT(
      [&] {
        sequence(leaf({2, 8}, torch::kFloat));
      },
      ThrowsError<c10::Error>(
          HasSubstr("memcnn: expected debug(true) to run eagerly, since it "
                    "compares values on the host, but got capture 3 of cpu. "
                    "Set debug(false) before the capture.")));
}

TEST(GraphCapture, Rule5TheCheckerIsRefused) {
  const PretendedCapture capture(3);
  EXPECT_THAT(
      [] {
        memcnn::is_invertible_module(linears(), {2, 8});
      },
      ThrowsError<c10::Error>(HasSubstr(
          "check_invertible_module(): expected to run eagerly, since it "
          "compares values on the host, but got capture 3 of cpu. Check before "
          "the capture.")));
}

TEST(GraphCapture, OutsideOfOneThereIsNone) {
  EXPECT_EQ(memcnn::detail::capture_of(torch::kCPU), 0U);
}

// Captures of a GPU.

constexpr int kWarmUp = 3;
constexpr int kSteps = 20;

/// A step of a small network, of which each block runs in some way. Two of one
/// way begin with the same weights.
class Training {
 public:
  using Block = std::function<torch::nn::AnyModule()>;

  Training(bool captured, const Block& block, torch::ScalarType dtype)
      : dtype_(dtype) {
    torch::manual_seed(1);
    stem_ = torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 8, 3).padding(1));
    stem_->to(device());
    add(*stem_);
    for (int i = 0; i < 4; ++i) {
      blocks_.push_back(block());
      blocks_.back().ptr()->to(device());
      add(*blocks_.back().ptr());
    }
    optimizer_ = std::make_unique<revnet::FusedSgd>(
        parameters_, torch::optim::SGDOptions(0.05).momentum(0.9));
    step_ = std::make_unique<CapturedStep>(
        device(),
        [this](const Tensors& inputs) { return Tensors{run(inputs[0])}; },
        revnet::CapturedStepOptions().warm_up(kWarmUp).enabled(captured));
  }

  static torch::Device device() {
    return {torch::kCUDA, 0};
  }

  torch::Tensor step(const torch::Tensor& image) {
    return (*step_)({image})[0].clone();
  }
  void warm_up(const torch::Tensor& image) {
    for (int i = 0; i < kWarmUp; ++i) {
      step(image);
    }
  }

  Tensors gradients() const {
    Tensors gradients;
    for (const torch::Tensor& parameter : parameters_) {
      gradients.push_back(parameter.grad().clone());
    }
    return gradients;
  }

  bool is_captured() const {
    return step_->is_captured();
  }
  torch::nn::AnyModule& block(size_t i) {
    return blocks_[i];
  }
  const Tensors& parameters() const {
    return parameters_;
  }

  // What a step does.
  bool updates = true;
  int backward_passes = 1;

 private:
  void add(const torch::nn::Module& module) {
    for (const torch::Tensor& parameter : module.parameters()) {
      parameters_.push_back(parameter);
    }
  }

  torch::Tensor loss_of(const torch::Tensor& image) {
    std::optional<Autocast> autocast;
    if (dtype_ != torch::kFloat) {
      autocast.emplace(torch::kCUDA, dtype_);
    }
    torch::Tensor x = stem_(image);
    for (torch::nn::AnyModule& block : blocks_) {
      x = block.forward(x);
    }
    return x.to(torch::kFloat).square().mean();
  }

  torch::Tensor run(const torch::Tensor& image) {
    optimizer_->zero_grad();
    const torch::Tensor loss = loss_of(image);
    for (int pass = 1; pass <= backward_passes; ++pass) {
      loss.backward({}, /*retain_graph=*/pass < backward_passes);
    }
    if (updates) {
      optimizer_->step();
    }
    return loss;
  }

  torch::ScalarType dtype_;
  torch::nn::Conv2d stem_{nullptr};
  std::vector<torch::nn::AnyModule> blocks_;
  Tensors parameters_;
  std::unique_ptr<revnet::FusedSgd> optimizer_;
  std::unique_ptr<CapturedStep> step_;
};

torch::Tensor image() {
  return torch::randn({4, 3, 8, 8}, Training::device());
}

/// Kernels of which each gives the same bits whenever it runs.
class CapturedCuda : public CudaGraphTest {
 protected:
  void SetUp() override {
    CudaGraphTest::SetUp();
    deterministic_ = at::globalContext().deterministicCuDNN();
    at::globalContext().setDeterministicCuDNN(true);
  }
  void TearDown() override {
    at::globalContext().setDeterministicCuDNN(deterministic_);
  }

 private:
  bool deterministic_ = false;
};

template <class F, class G>
torch::nn::AnyModule
additive(Way way, F f, G g, std::optional<int64_t> bits = std::nullopt) {
  return run_in(
      way,
      memcnn::AdditiveCoupling<F, G>(
          f, g, memcnn::CouplingOptions().fractional_bits(bits)));
}

torch::nn::AnyModule conv_coupling(Way way) {
  return additive(way, ConvBranch(4), ConvBranch(4));
}
/// Writes what its convolutions return.
torch::nn::AnyModule relu_coupling(Way way) {
  const auto branch = [] {
    return torch::nn::Sequential(
        torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).padding(1)),
        torch::nn::ReLU(torch::nn::ReLUOptions(/*inplace=*/true)));
  };
  return additive(way, branch(), branch());
}
torch::nn::AnyModule exact_coupling(Way way) {
  return additive(way, ConvBranch(4), ConvBranch(4), /*bits=*/14);
}
torch::nn::AnyModule dropout_coupling(Way way) {
  return additive(way, DropoutBranch(4), DropoutBranch(4));
}
torch::nn::AnyModule affine_coupling(Way way) {
  return run_in(
      way,
      memcnn::AffineCoupling(
          memcnn::AffineAdapterSigmoid(WideBranch(4)),
          memcnn::AffineAdapterSigmoid(WideBranch(4))));
}

/// Runs both for kSteps, of which the second one replays all but the first.
void expect_equal_losses(Training& eager, Training& captured) {
  torch::manual_seed(5);
  for (int step = 0; step < kWarmUp + kSteps; ++step) {
    const torch::Tensor x = image();
    const torch::Tensor expected = eager.step(x);
    EXPECT_TRUE(captured.step(x).equal(expected)) << "step " << step;
  }
  EXPECT_TRUE(captured.is_captured());
  EXPECT_TRUE(all_equal(captured.gradients(), eager.gradients()));
  EXPECT_TRUE(all_equal(captured.parameters(), eager.parameters()));
}

// Rule 1: a replayed step computes what the eager step computes.

class ReplayCuda : public CapturedCuda,
                   public testing::WithParamInterface<Way> {
 protected:
  void expect_replays(
      torch::nn::AnyModule (*block)(Way),
      torch::ScalarType dtype,
      int backward_passes = 1) {
    const auto in_this_way = [&] {
      return block(GetParam());
    };
    Training eager(/*captured=*/false, in_this_way, dtype);
    Training captured(/*captured=*/true, in_this_way, dtype);
    eager.backward_passes = captured.backward_passes = backward_passes;
    expect_equal_losses(eager, captured);
  }
};

INSTANTIATE_TEST_SUITE_P(
    Ways,
    ReplayCuda,
    testing::Values(
        Way::kPlain,
        Way::kWrapper,
        Way::kKeepInput,
        Way::kResults,
        Way::kSequence,
        Way::kBudget,
        Way::kCheckpoint,
        Way::kCheckpointResults),
    way_name);

TEST_P(ReplayCuda, Rule1LossesEqualEagerOnesInFloat32) {
  expect_replays(&conv_coupling, torch::kFloat);
}
TEST_P(ReplayCuda, Rule1LossesEqualEagerOnesInBFloat16) {
  expect_replays(&conv_coupling, torch::kBFloat16);
}
TEST_P(ReplayCuda, Rule1HoldsWhereBranchesWriteWhatWouldBeKept) {
  expect_replays(&relu_coupling, torch::kFloat);
}
TEST_P(ReplayCuda, Rule1HoldsForAffineCouplings) {
  expect_replays(&affine_coupling, torch::kFloat);
}
TEST_P(ReplayCuda, Rule1HoldsForTheExactMode) {
  expect_replays(&exact_coupling, torch::kFloat);
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCUDA));
}
TEST_P(ReplayCuda, Rule1HoldsForARetainedGraph) {
  expect_replays(&conv_coupling, torch::kFloat, /*backward_passes=*/3);
}

/// Four layers as checkpoint_sequential() runs them.
struct SegmentsImpl : torch::nn::Module {
  explicit SegmentsImpl(int64_t budget)
      : options(memcnn::CheckpointSequentialOptions().segments(2).memory_budget(
            budget)) {}
  torch::Tensor forward(torch::Tensor x) {
    return memcnn::checkpoint_sequential(options, layers, x);
  }

  memcnn::CheckpointSequentialOptions options;
  torch::nn::Sequential layers = register_module(
      "layers",
      torch::nn::Sequential(
          ConvBranch(8),
          ConvBranch(8),
          ConvBranch(8),
          ConvBranch(8)));
};

TEST_F(CapturedCuda, Rule1HoldsForCheckpointSequential) {
  for (const int64_t budget : {0, 100'000}) {
    const auto segments = [&] {
      return torch::nn::AnyModule(std::make_shared<SegmentsImpl>(budget));
    };
    Training eager(/*captured=*/false, segments, torch::kFloat);
    Training captured(/*captured=*/true, segments, torch::kFloat);
    expect_equal_losses(eager, captured);
  }
}

TEST_F(CapturedCuda, Rule1HoldsForSomeResultsWithinABudget) {
  constexpr int64_t kResult = 4 * 4 * 8 * 8 * 4; // bytes
  for (const int64_t results : {1, 3, 4, 7}) {
    const auto pair = [&] {
      return torch::nn::AnyModule(memcnn::ReversibleSequence(
          memcnn::ReversibleSequenceOptions().memory_budget(results * kResult),
          memcnn::AdditiveCoupling(ConvBranch(4), ConvBranch(4)),
          memcnn::AdditiveCoupling(ConvBranch(4), ConvBranch(4))));
    };
    Training eager(/*captured=*/false, pair, torch::kFloat);
    Training captured(/*captured=*/true, pair, torch::kFloat);
    expect_equal_losses(eager, captured);
    const auto& kept =
        captured.block(0).get<memcnn::ReversibleSequence>()->kept();
    EXPECT_GT(kept.results + kept.blocks, 0u);
    EXPECT_LE(kept.bytes, results * kResult);
  }
}

TEST_F(CapturedCuda, Rule1ABudgetThatWasMeasuredBeforeHolds) {
  // The bytes that a chain holds after forward.
  const auto held_with = [](int64_t budget) {
    memcnn::ReversibleSequence sequence(
        memcnn::ReversibleSequenceOptions().memory_budget(budget));
    for (int i = 0; i < 8; ++i) {
      sequence->push_back(
          memcnn::AdditiveCoupling(SmoothBranch(4), SmoothBranch(4)));
    }
    sequence->to(Training::device());
    int64_t held = 0;
    CapturedStep step(
        Training::device(),
        [&](const Tensors& inputs) {
          sequence->zero_grad();
          memcnn::AllocationMeter meter;
          const torch::Tensor y = sequence(inputs[0]);
          held =
              meter
                  .held_bytes(); // measured on the host, in the capture as well
          const torch::Tensor loss = y.sum();
          loss.backward();
          return Tensors{loss};
        },
        revnet::CapturedStepOptions().warm_up(kWarmUp));
    const torch::Tensor x = torch::randn({8, 8, 32, 32}, Training::device());
    for (int i = 0; i < kWarmUp; ++i) {
      step({x});
    }
    const int64_t eager = held;
    step({x});
    EXPECT_TRUE(step.is_captured());
    EXPECT_EQ(held, eager);
    return held;
  };
  const int64_t without = held_with(0);
  const int64_t budget = 2 << 20;
  const int64_t within = held_with(budget);
  EXPECT_GT(within, without);
  EXPECT_LE(within, without + budget);
}

// Rule 2: random numbers.

TEST_P(ReplayCuda, Rule2DropoutGradientsEqualPlainOnes) {
  Training plain(
      /*captured=*/false,
      [] { return dropout_coupling(Way::kPlain); },
      torch::kFloat);
  Training captured(
      /*captured=*/true,
      [&] { return dropout_coupling(GetParam()); },
      torch::kFloat);
  plain.updates = captured.updates = false;
  const torch::Tensor x = image();
  plain.warm_up(x);
  captured.warm_up(x);
  captured.step(x); // captures
  torch::manual_seed(99);
  std::vector<Tensors> expected;
  for (int i = 0; i < 2; ++i) {
    plain.step(x);
    expected.push_back(plain.gradients());
  }
  EXPECT_FALSE(all_equal(expected[0], expected[1])); // other masks in each
  torch::manual_seed(99);
  for (int i = 0; i < 2; ++i) {
    captured.step(x);
    EXPECT_LT(
        relative_error(captured.gradients(), expected[i]), kGradientFloat32)
        << "replay " << i;
  }
}

// Rules 3 and 5: what is refused, in the words of this library.

/// What the capture of a step fails with.
std::string failure_of(const CapturedStep::Function& work) {
  CapturedStep step(
      Training::device(), work, revnet::CapturedStepOptions().warm_up(1));
  step();
  try {
    step();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST_F(CapturedCuda, Rule3BackwardInAnotherCaptureIsAnError) {
  memcnn::ReversibleSequence sequence(linears());
  sequence->to(Training::device());
  const torch::Tensor x = torch::randn({2, 8}, Training::device());
  torch::Tensor loss;
  const std::string failure = failure_of([&](const Tensors&) {
    if (!loss.defined()) {
      loss = sequence(x).sum();
    } else {
      loss.backward();
    }
    return Tensors{};
  });
  EXPECT_THAT(
      failure,
      HasSubstr("ReversibleSequence::forward(): expected backward where "
                "forward ran, which was eager work, but got capture "));
}

TEST_F(CapturedCuda, Rule3BackwardOfACapturedForwardIsAnError) {
  memcnn::ReversibleSequence sequence(linears());
  sequence->to(Training::device());
  const torch::Tensor x = torch::randn({2, 8}, Training::device());
  torch::Tensor loss;
  EXPECT_EQ(
      failure_of([&](const Tensors&) {
        loss = sequence(x).sum();
        return Tensors{};
      }),
      "");
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("which was capture "), HasSubstr("but got eager work")));
}

TEST_F(CapturedCuda, Rule5DebugIsRefused) {
  memcnn::ReversibleSequence sequence(linears());
  sequence->to(Training::device());
  const torch::Tensor x = torch::randn({2, 8}, Training::device());
  EXPECT_THAT(
      failure_of([&](const Tensors&) {
        const torch::Tensor loss = sequence(x).sum();
        sequence->options.debug(true);
        return Tensors{};
      }),
      HasSubstr("memcnn: expected debug(true) to run eagerly"));
}

// Rule 4: memory of before.

TEST_F(CapturedCuda, Rule4AnInputOfBeforeIsKept) {
  memcnn::InvertibleModuleWrapper block(linears());
  block->to(Training::device());
  const torch::Tensor leaf =
      torch::randn({2, 8}, Training::device()).requires_grad_();
  const Tensors made_before = {leaf * 1, leaf * 1};
  std::vector<std::string> reasons;
  EXPECT_EQ(
      failure_of([&](const Tensors&) {
        const size_t call = reasons.size() / 2;
        for (const torch::Tensor& h : {leaf * 1, made_before[call]}) {
          block(h);
          reasons.emplace_back(block->input_kept_because());
        }
        return Tensors{};
      }),
      "");
  ASSERT_EQ(reasons.size(), 4U); // of the warm-up, and of the capture
  EXPECT_EQ(reasons[2], "");
  EXPECT_EQ(
      reasons[3], "it was made before the capture, and every replay reads it");
}

// Rule 5: the exact mode checks on the device.

TEST_F(CapturedCuda, Rule5AReplayThatLeavesTheExactRangeIsTold) {
  Linears coupling = linears(/*bits=*/20); // exact below 16
  coupling->to(Training::device());
  CapturedStep step(
      Training::device(),
      [&](const Tensors& inputs) { return Tensors{coupling(inputs[0])}; },
      revnet::CapturedStepOptions().warm_up(kWarmUp));
  const torch::Tensor x = torch::ones({2, 8}, Training::device());
  for (int i = 0; i <= kWarmUp; ++i) {
    step({x});
  }
  EXPECT_TRUE(step.is_captured());
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCUDA));
  step({x * 100});
  EXPECT_THAT(
      [] { memcnn::check_exact_range(torch::kCUDA); },
      ThrowsError<c10::ValueError>(
          HasSubstr("expected values below 2^4 = 16"),
          HasSubstr("in an earlier call on cuda:0")));
  EXPECT_NO_THROW(memcnn::check_exact_range(torch::kCUDA));
}

// Rule 6: what the host decides is decided once.

TEST_F(CapturedCuda, Rule6TrainModeIsThatOfTheCapture) {
  Training training(
      /*captured=*/true,
      [] { return dropout_coupling(Way::kSequence); },
      torch::kFloat);
  training.updates = false;
  const torch::Tensor x = image();
  training.warm_up(x);
  training.step(x);
  for (size_t i = 0; i < 4; ++i) {
    training.block(i).ptr()->eval();
  }
  EXPECT_FALSE(training.step(x).equal(training.step(x))); // still draws
}

} // namespace
} // namespace memcnn_test
