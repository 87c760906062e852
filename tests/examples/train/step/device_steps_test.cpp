// SPDX-License-Identifier: MIT

// What a GPU does in a step, on the CPU, which gives it the bits of the CPU's own
// steps; and on a GPU as a graph.

#include <memcnn/allocation_meter.h>
#include "train/data/synthetic.h"
#include "train/run/trainer_state.h"
#include "train/step/device_tally.h"
#include "train/step/trainer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace training;

DataSet small_data() {
  SyntheticSizes sizes;
  sizes.train = 22;
  sizes.test = 20;
  return make_synthetic(sizes);
}

Config small_config(const std::string& model) {
  Config config;
  config.model = model;
  config.dataset = "synthetic";
  config.batch_size = 4;
  config.iterations = 20;
  config.learning_rate = 0.01;
  return config;
}

void expect_equal_state(Trainer& found, Trainer& expected) {
  const auto tensors = trainer_state(found);
  for (const auto& item : trainer_state(expected)) {
    if (item.key().rfind("generator", 0) != 0) {
      EXPECT_TRUE(torch::equal(tensors[item.key()].cpu(), item.value().cpu()))
          << item.key();
    }
  }
}

// --- the sums ---------------------------------------------------------------

torch::Tensor figures(double loss, double first, double top5) {
  return torch::tensor({loss, first, top5}, torch::kFloat64);
}

TEST(DeviceTally, AddsUpWhatStepsTell) {
  DeviceTally tally(torch::kCPU);
  EXPECT_EQ(tally.add(figures(0.5, 1, 3)).item<float>(), 0);
  EXPECT_EQ(tally.add(figures(0.25, 2, 4)).item<float>(), 0);
  const StepReport report = tally.read();
  EXPECT_EQ(report.sums.steps, 2);
  EXPECT_EQ(report.sums.loss, 0.75);
  EXPECT_EQ(report.sums.hits.first, 3);
  EXPECT_EQ(report.sums.hits.top5, 7);
  EXPECT_FALSE(report.bad_loss.has_value());
  EXPECT_EQ(tally.read().sums.steps, 0) << "begins anew";
}

TEST(DeviceTally, StopsAtTheFirstLossThatIsNotFinite) {
  DeviceTally tally(torch::kCPU);
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(tally.add(figures(0.5, 1, 3)).item<float>(), 0);
  EXPECT_EQ(tally.add(figures(-infinity, 1, 3)).item<float>(), 1);
  EXPECT_EQ(tally.add(figures(NAN, 1, 3)).item<float>(), 1);
  EXPECT_EQ(tally.add(figures(0.5, 1, 3)).item<float>(), 1) << "sticks";
  const StepReport report = tally.read();
  EXPECT_EQ(report.sums.steps, 1);
  EXPECT_EQ(report.sums.loss, 0.5);
  EXPECT_EQ(report.sums.hits.first, 1);
  EXPECT_EQ(report.bad_loss, -infinity);
}

// --- the steps of a GPU on the CPU ------------------------------------------

TEST(DeviceSteps, LearnWhatHostStepsLearnBitForBit) {
  const DataSet data = small_data();
  for (const std::string model : {"resnet32", "revnet38"}) {
    SCOPED_TRACE(model);
    const Config config = small_config(model);
    memcnn::AllocationMeter meter;
    Trainer host(config, data, torch::kCPU, meter);
    Trainer device(config, data, torch::kCPU, meter, StepsOn::kDevice);
    EXPECT_FALSE(host.runs_ahead());
    EXPECT_TRUE(device.runs_ahead());
    for (const int64_t end : {1, 4, 12}) {
      StepSums expected;
      for (int64_t i = end / 4; i < end; ++i) {
        host.step(i);
        device.step(i);
        expected += host.read().sums;
      }
      const StepReport found = device.read();
      EXPECT_EQ(found.sums.steps, expected.steps);
      EXPECT_EQ(found.sums.loss, expected.loss);
      EXPECT_EQ(found.sums.hits.first, expected.hits.first);
      EXPECT_EQ(found.sums.hits.top5, expected.hits.top5);
      EXPECT_GT(found.sums.milliseconds, 0);
      EXPECT_GT(found.sums.memory.held_after_forward, 0);
      EXPECT_GT(found.sums.memory.peak, found.sums.memory.held_after_forward);
      EXPECT_FALSE(found.bad_loss.has_value());
    }
    expect_equal_state(device, host);
    const auto go_on = [](double) {
      return true;
    };
    EXPECT_EQ(device.evaluate(go_on)->loss, host.evaluate(go_on)->loss);
    EXPECT_TRUE(torch::equal(device.batch(7).images, host.batch(7).images));
  }
}

TEST(DeviceSteps, ChangeNothingFromABadLossOn) {
  const DataSet data = small_data();
  const Config config = small_config("resnet32");
  memcnn::AllocationMeter meter;
  for (const StepsOn steps_on : {StepsOn::kHost, StepsOn::kDevice}) {
    Trainer trainer(config, data, torch::kCPU, meter, steps_on);
    trainer.step(0);
    trainer.step(1);
    auto weight = trainer.network().parameters().back();
    {
      const torch::NoGradGuard no_grad;
      weight.fill_(NAN);
    }
    const auto before = trainer.network().parameters().front().clone();
    trainer.step(2);
    {
      const torch::NoGradGuard no_grad;
      weight.fill_(0);
    }
    trainer.step(3);
    const StepReport report = trainer.read();
    EXPECT_EQ(report.sums.steps, 2);
    ASSERT_TRUE(report.bad_loss.has_value());
    EXPECT_TRUE(std::isnan(*report.bad_loss));
    EXPECT_TRUE(torch::equal(trainer.network().parameters().front(), before));
  }
}

// --- on a GPU ---------------------------------------------------------------

class DeviceStepsCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) {
      GTEST_SKIP() << "no CUDA device";
    }
    at::globalContext().setBenchmarkCuDNN(false);
    at::globalContext().setDeterministicCuDNN(true);
  }

  /// The losses of 20 steps, each read when it is done or all at once.
  std::vector<double>
  losses(Config config, bool graph, bool one_by_one, StateDict* state) {
    config.cuda_graph = graph;
    memcnn::AllocationMeter meter(torch::kCUDA);
    Trainer trainer(config, data_, torch::kCUDA, meter);
    std::vector<double> found;
    for (int64_t i = 0; i < config.iterations; ++i) {
      trainer.step(i);
      if (one_by_one || i + 1 == config.iterations) {
        const StepSums sums = trainer.read().sums;
        // The first step takes workspaces as well: it tells nothing.
        EXPECT_EQ(sums.memory.held_after_forward > 0, i > 0);
        found.push_back(sums.loss);
      }
    }
    *state = trainer_state(trainer);
    return found;
  }

  const DataSet data_ = small_data();
};

TEST_F(DeviceStepsCuda, LearnAsOneGraphWhatTheyLearnKernelByKernel) {
  for (const bool amp : {false, true}) {
    for (const std::string model : {"resnet32", "revnet38"}) {
      SCOPED_TRACE(model);
      Config config = small_config(model);
      config.amp = amp;
      StateDict eager, graph, queued;
      EXPECT_EQ(
          losses(config, /*graph=*/true, /*one_by_one=*/true, &graph),
          losses(config, /*graph=*/false, /*one_by_one=*/true, &eager));
      losses(config, /*graph=*/true, /*one_by_one=*/false, &queued);
      for (const auto& item : eager) {
        for (const StateDict* other : {&graph, &queued}) {
          EXPECT_TRUE(torch::equal((*other)[item.key()], item.value()))
              << item.key();
        }
      }
    }
  }
}

TEST_F(DeviceStepsCuda, ChangeNothingFromABadLossOnInReplays) {
  const Config config = small_config("resnet32");
  memcnn::AllocationMeter meter(torch::kCUDA);
  Trainer trainer(config, data_, torch::kCUDA, meter);
  for (int64_t i = 0; i < 15; ++i) {
    trainer.step(i);
  }
  {
    const torch::NoGradGuard no_grad;
    trainer.network().parameters().back().fill_(NAN);
  }
  const auto before = trainer.network().parameters().front().clone();
  trainer.step(15);
  trainer.step(16);
  const StepReport report = trainer.read();
  EXPECT_EQ(report.sums.steps, 15);
  EXPECT_TRUE(report.bad_loss.has_value());
  EXPECT_TRUE(torch::equal(trainer.network().parameters().front(), before));
}

TEST_F(DeviceStepsCuda, GoOnFromACheckpointWithTheSameLosses) {
  const Config config = small_config("revnet38");
  memcnn::AllocationMeter meter(torch::kCUDA);
  Trainer whole(config, data_, torch::kCUDA, meter);
  const auto loss = [](Trainer& trainer, int64_t iteration) {
    trainer.step(iteration);
    return trainer.read().sums.loss;
  };
  for (int64_t i = 0; i < 14; ++i) {
    whole.step(i);
  }
  whole.read();
  StateDict state;
  for (const auto& item : trainer_state(whole)) {
    state.insert(item.key(), item.value().clone());
  }
  Trainer resumed(config, data_, torch::kCUDA, meter);
  restore_trainer(state, resumed);
  for (int64_t i = 14; i < 30; ++i) { // eager again at first
    EXPECT_EQ(loss(resumed, i), loss(whole, i)) << i;
  }
}

} // namespace
