// SPDX-License-Identifier: MIT

#include <memcnn/allocation_meter.h>
#include "train/data/synthetic.h"
#include "train/run/checkpoint.h"
#include "train/run/classes.h"
#include "train/run/trainer_state.h"
#include "train/step/figures.h"
#include "train/step/network.h"
#include "train/step/trainer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace training;

/// What one step has to tell.
StepSums sums_of(Trainer& trainer, int64_t iteration) {
  trainer.step(iteration);
  return trainer.read().sums;
}

// --- training ---------------------------------------------------------------

TEST(Config, CutsTheLearningRateAtHalfAndThreeQuarters) {
  const Config config; // 80000 iterations
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 39999), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 40000), 0.01);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 59999), 0.01);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 60000), 0.001);
}

TEST(MemoryBudget, IsSharedByWhatResultsTake) {
  // Of 2 images: 12 convolutions of 16 channels, 8 of 32 and 8 of 56, and two
  // numbers a channel.
  const auto results = result_bytes(
      revnet::named("revnet38"), /*batch_size=*/2, /*number_bytes=*/4);
  const std::vector<int64_t> expected = {
      12 * 16 * (2 * 1024 * 4 + 8),
      8 * 32 * (2 * 256 * 4 + 8),
      8 * 56 * (2 * 64 * 4 + 8)};
  EXPECT_EQ(results, expected);

  const std::vector<int64_t> sizes = {50, 30, 20};
  using Shares = std::vector<int64_t>;
  EXPECT_EQ(shares_of(0, sizes), Shares({0, 0, 0}));
  EXPECT_EQ(shares_of(45, sizes), Shares({0, 25, 20}));
  EXPECT_EQ(shares_of(100, sizes), Shares({50, 30, 20}));
  EXPECT_EQ(shares_of(125, sizes), Shares({50, 35, 40}));
  EXPECT_EQ(shares_of(230, sizes), Shares({130, 60, 40}));
}

/// What a network keeps of its training step.
memcnn::KeptActivations
kept_within(int64_t mebibytes, const char* model, int64_t batch_size) {
  Config config;
  config.model = model;
  config.memory_budget = mebibytes;
  config.batch_size = batch_size;
  auto network = make_network(config, /*num_classes=*/10);
  network(torch::randn({batch_size, 3, 32, 32}));
  return kept_by(*network);
}

TEST(MemoryBudget, SparesTheSecondRunWhereResultsFit) {
  // Of narrow 1x1 convolutions the results are worth no more than whole blocks.
  for (const auto& [model, share] :
       {std::pair("revnet38", 1.0), std::pair("revnet164", 0.9)}) {
    const auto results = result_bytes(revnet::named(model), 4, 4);
    const int64_t all = results[0] + results[1] + results[2];
    const int64_t mebibytes = (all >> 20) + 1;
    const memcnn::KeptActivations kept = kept_within(mebibytes, model, 4);
    EXPECT_GE(kept.spared, share * kept.multiply_adds) << model;
    EXPECT_LE(kept.bytes, mebibytes << 20) << model;
    const memcnn::KeptActivations some = kept_within(mebibytes / 2, model, 4);
    EXPECT_GT(some.spared, some.multiply_adds / 2) << model;
    EXPECT_LE(some.bytes, mebibytes << 19) << model;
    EXPECT_EQ(kept_within(0, model, 4).results, 0u) << model;
  }
}

/// A run with this budget, stopped and gone on with, against one that was not.
void expect_resumed_bit_for_bit(int64_t mebibytes) {
  SyntheticSizes sizes;
  sizes.train = 12;
  sizes.test = 4;
  const auto data = make_synthetic(sizes);
  Config config;
  config.model = "revnet38";
  config.dataset = "synthetic";
  config.memory_budget = mebibytes;
  config.batch_size = 4;
  config.iterations = 4;
  memcnn::AllocationMeter meter;
  Trainer whole(config, data, torch::kCPU, meter);
  RunState state;
  for (int64_t i = 0; i < 2; ++i) {
    state.add(sums_of(whole, i));
  }
  const auto bytes = make_checkpoint(config, /*fingerprint=*/7, state, whole);
  const auto drawn = torch::rand({3});

  Trainer resumed(config, data, torch::kCPU, meter);
  RunState found = restore_checkpoint(bytes, "a file", config, 7, resumed);
  EXPECT_TRUE(torch::equal(torch::rand({3}), drawn));
  EXPECT_EQ(found.iteration, 2);
  EXPECT_EQ(found.since_row.steps, 2);
  EXPECT_EQ(found.since_row.loss, state.since_row.loss);
  EXPECT_EQ(found.since_row.hits.first, state.since_row.hits.first);
  EXPECT_EQ(found.since_row.hits.top5, state.since_row.hits.top5);
  EXPECT_EQ(found.since_row.memory.peak, state.since_row.memory.peak);
  EXPECT_EQ(found.step_milliseconds, state.step_milliseconds);
  EXPECT_EQ(found.memory.peak, state.memory.peak);
  for (int64_t i = 2; i < 4; ++i) {
    EXPECT_EQ(sums_of(resumed, i).loss, sums_of(whole, i).loss);
  }
  const auto expected = whole.network().parameters();
  const auto parameters = resumed.network().parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    EXPECT_TRUE(torch::equal(parameters[i], expected[i]));
  }
  const auto buffers = whole.network().buffers();
  for (size_t i = 0; i < buffers.size(); ++i) {
    EXPECT_TRUE(torch::equal(resumed.network().buffers()[i], buffers[i]));
  }
}

TEST(Checkpoint, ResumesBitForBit) {
  expect_resumed_bit_for_bit(0);
}

TEST(Checkpoint, ResumesBitForBitWithABudget) {
  expect_resumed_bit_for_bit(2); // some results
  expect_resumed_bit_for_bit(6); // all of them, or whole blocks
}

/// What is said of a trainer's tensors after a change.
std::string flaw_after(const std::function<void(StateDict&)>& change) {
  SyntheticSizes sizes;
  sizes.train = 4;
  sizes.test = 4;
  Config config;
  config.model = "resnet32";
  config.batch_size = 4;
  memcnn::AllocationMeter meter;
  Trainer trainer(config, make_synthetic(sizes), torch::kCPU, meter);
  StateDict state = trainer_state(trainer);
  change(state);
  try {
    restore_trainer(state, trainer);
  } catch (const FormatError& flaw) {
    return flaw.what();
  }
  return "nothing";
}

TEST(TrainerState, HasToFitTheTrainer) {
  EXPECT_EQ(flaw_after([](StateDict&) {}), "nothing");
  for (const std::string name :
       {"network.stem.0.weight",
        "network.stem.1.running_mean",
        "momentum.stem.0.weight",
        "generator.cpu"}) {
    EXPECT_EQ(
        flaw_after([&](StateDict& state) { state.erase(name); }),
        "it lacks the tensor " + name);
  }
  EXPECT_EQ(
      flaw_after([](StateDict& state) {
        state["network.stem.1.weight"] = torch::zeros({1});
      }),
      "its tensor network.stem.1.weight has sizes [1] and dtype float32 instead "
      "of sizes [16] and dtype float32");
  EXPECT_EQ(
      flaw_after([](StateDict& state) {
        state["network.stem.1.weight"] = torch::zeros({16}, torch::kFloat64);
      }),
      "its tensor network.stem.1.weight has sizes [16] and dtype float64 "
      "instead of sizes [16] and dtype float32");
}

TEST(TrainerState, HasRandomNumbersThatThereAre) {
  const std::string none = "its state of random numbers is none";
  const auto flaw_of = [](const torch::Tensor& state) {
    return flaw_after(
        [&](StateDict& tensors) { tensors["generator.cpu"] = state; });
  };
  torch::rand({100}); // some numbers are drawn, and some left
  const auto state = generator_state(torch::kCPU);
  EXPECT_EQ(flaw_of(state), "nothing");
  EXPECT_EQ(flaw_of(state.slice(0, 1)), none);
  EXPECT_EQ(flaw_of(state.to(torch::kInt8)), none);
  EXPECT_EQ(flaw_of(state[0].expand({state.size(0)})), none);
  EXPECT_EQ(flaw_of(torch::zeros_like(state)), none);
  // LibTorch itself would take it, and read 623 numbers from the last one on.
  auto beyond = state.clone();
  beyond.narrow(0, 8, 4).view(torch::kInt32).fill_(624);
  beyond.narrow(0, 16, 8).view(torch::kInt64).fill_(624);
  EXPECT_EQ(flaw_of(beyond), none);
}

TEST(Figures, CountTheFirstAndTheFirstFive) {
  // Row i has its labels' logit in place i of the order.
  const auto logits = torch::arange(7, 0, -1, torch::kFloat32).repeat({7, 1});
  const auto found =
      figures_of(torch::tensor(0.5F), ranked_hits(logits, torch::arange(7)));
  const auto hits = hits_of(found);
  EXPECT_EQ(found[0].item<double>(), 0.5);
  EXPECT_EQ(hits.first, 1);
  EXPECT_EQ(hits.top5, 5);
}

TEST(Trainer, LeavesTheWeightsAloneWhereTheLossIsNotFinite) {
  SyntheticSizes sizes;
  sizes.train = 4;
  sizes.test = 4;
  Config config;
  config.model = "resnet32";
  config.batch_size = 4;
  memcnn::AllocationMeter meter;
  Trainer trainer(config, make_synthetic(sizes), torch::kCPU, meter);
  {
    const torch::NoGradGuard no_grad;
    trainer.network().parameters().back().fill_(NAN);
  }
  const auto before = trainer.network().parameters().front().clone();
  trainer.step(0);
  const StepReport report = trainer.read();
  ASSERT_TRUE(report.bad_loss.has_value());
  EXPECT_TRUE(std::isnan(*report.bad_loss));
  EXPECT_EQ(report.sums.steps, 0);
  EXPECT_TRUE(torch::equal(trainer.network().parameters().front(), before));
  EXPECT_FALSE(trainer.weights_are_finite());
}

TEST(Trainer, EvaluatesTheSameImagesTheSameWay) {
  SyntheticSizes sizes;
  sizes.train = 4;
  sizes.test = 20;
  Config config;
  config.model = "resnet32";
  config.batch_size = 4;
  memcnn::AllocationMeter meter;
  Trainer trainer(config, make_synthetic(sizes), torch::kCPU, meter);
  const auto go_on = [](double) {
    return true;
  };
  const auto first = trainer.evaluate(go_on).value();
  const auto second = trainer.evaluate(go_on).value();
  EXPECT_EQ(first.loss, second.loss);
  EXPECT_EQ(first.accuracy, second.accuracy);

  ASSERT_EQ(first.classes.size(), 10U);
  int64_t hits = 0;
  for (const ClassResult& result : first.classes) {
    EXPECT_EQ(result.images, sizes.test / 10);
    hits += result.hits;
  }
  EXPECT_EQ(hits, std::llround(first.accuracy * 20));
}

TEST(Evaluation, IsOfEveryClassThatHasImages) {
  Evaluation evaluation;
  evaluation.classes = {{4, 1}, {0, 0}, {2, 2}};
  const auto named = accuracy_by_class(evaluation, {"cat", "dog", "owl"});
  ASSERT_EQ(named.size(), 2U);
  EXPECT_EQ(named[0].name, "cat");
  EXPECT_EQ(named[0].accuracy, 0.25);
  EXPECT_EQ(named[1].name, "owl");
  EXPECT_EQ(named[1].accuracy, 1);
  EXPECT_EQ(accuracy_by_class(evaluation, {})[1].name, "2");
}

TEST(Evaluation, PrintsTheClassesThatAreToldBestAndWorst) {
  Evaluation evaluation;
  evaluation.classes = {{4, 1}, {0, 0}, {4, 4}, {4, 0}, {4, 2}};
  const auto printed = [&](const std::vector<std::string>& names) {
    testing::internal::CaptureStdout();
    print_classes(evaluation, names);
    return testing::internal::GetCapturedStdout();
  };
  EXPECT_EQ(
      printed({"cat", "dog", "owl", "fox", "bat"}),
      "  best classes          owl 100 %, bat 50 %, cat 25 %, fox 0 %\n"
      "  worst classes         fox 0 %, cat 25 %, bat 50 %, owl 100 %\n");
  EXPECT_EQ(printed({}), "");
}

// --- on a GPU ---------------------------------------------------------------

class TrainerCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
    SyntheticSizes sizes;
    sizes.train = 12;
    sizes.test = 12;
    data_ = make_synthetic(sizes);
    config_.batch_size = 4;
    config_.iterations = 4;
  }

  std::vector<double> losses(torch::Device device) {
    memcnn::AllocationMeter meter(device.type());
    Trainer trainer(config_, data_, device, meter);
    std::vector<double> found;
    for (int64_t i = 0; i < config_.iterations; ++i) {
      const StepSums step = sums_of(trainer, i);
      // A GPU's first step takes workspaces as well: it tells nothing.
      const bool told = i > 0 || !device.is_cuda();
      EXPECT_EQ(step.memory.held_after_forward > 0, told);
      EXPECT_EQ(step.memory.peak > step.memory.held_after_forward, told);
      found.push_back(step.loss);
    }
    found.push_back(trainer.evaluate([](double) { return true; }).value().loss);
    return found;
  }

  DataSet data_;
  Config config_;
};

TEST_F(TrainerCuda, LearnsWhatItLearnsOnTheCpu) {
  for (const std::string model : {"resnet32", "revnet38"}) {
    config_.model = model;
    const auto expected = losses(torch::kCPU);
    const auto found = losses(torch::kCUDA);
    for (size_t i = 0; i < 2; ++i) { // rounding soon drives them apart
      EXPECT_NEAR(found[i], expected[i], 0.02 * expected[i]) << model << i;
    }
    config_.amp = true;
    EXPECT_NEAR(losses(torch::kCUDA)[0], expected[0], 0.05 * expected[0])
        << model;
    config_.amp = false;
  }
}

TEST_F(TrainerCuda, GoesOnFromACheckpoint) {
  config_.model = "revnet38";
  memcnn::AllocationMeter meter(torch::kCUDA);
  Trainer first(config_, data_, torch::kCUDA, meter);
  RunState state;
  state.add(sums_of(first, 0));
  const auto bytes = make_checkpoint(config_, /*fingerprint=*/7, state, first);
  Trainer second(config_, data_, torch::kCUDA, meter);
  restore_checkpoint(bytes, "a file", config_, 7, second);
  EXPECT_NEAR(sums_of(second, 1).loss, sums_of(first, 1).loss, 1e-3);
}

} // namespace
