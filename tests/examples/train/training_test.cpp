// SPDX-License-Identifier: MIT

#include <memcnn/allocation_meter.h>
#include "support/throws_error.h"
#include "train/data/synthetic.h"
#include "train/libtorch/device_read.h"
#include "train/run/checkpoint.h"
#include "train/step/network.h"
#include "train/step/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>
#include <string>
#include <vector>

namespace {

using memcnn_test::ThrowsError;
using testing::StartsWith;
using testing::StrEq;
using namespace training;

int64_t parameter_count(const std::string& model, int64_t num_classes) {
  Config config;
  config.model = model;
  int64_t count = 0;
  const auto network = make_network(config, num_classes);
  for (const auto& parameter : network.ptr()->parameters()) {
    count += parameter.numel();
  }
  return count;
}

TEST(Networks, HaveThePublishedNumberOfParameters) {
  EXPECT_EQ(parameter_count("resnet32", 10), 466906);
  EXPECT_EQ(parameter_count("resnet110", 10), 1730714);
  EXPECT_EQ(parameter_count("resnet164", 10), 1704154);
  EXPECT_EQ(parameter_count("revnet38", 10), 573994);
  EXPECT_EQ(parameter_count("revnet110", 10), 1854890);
  EXPECT_EQ(parameter_count("revnet164", 10), 1983786);
  EXPECT_EQ(parameter_count("resnet32", 100), 466906 + 90 * 65);
}

TEST(Networks, RejectUnknownNames) {
  EXPECT_THROW(resnet::named("resnet33"), c10::ValueError);
  EXPECT_THAT(
      [] { revnet::named("revnet39"); },
      ThrowsError<c10::ValueError>(
          StrEq("revnet::named(): expected a name out of revnet38 revnet110 "
                "revnet164, but got \"revnet39\".")));
}

TEST(Networks, RejectUnequalGroups) {
  EXPECT_THROW(
      revnet::RevNet(revnet::RevNetOptions().blocks({1, 1})), c10::ValueError);
  EXPECT_THROW(
      resnet::ResNet(resnet::ResNetOptions().blocks({1, 1})), c10::ValueError);
}

TEST(Networks, RejectOptionsOutOfRange) {
  EXPECT_THROW(
      revnet::RevNet(revnet::RevNetOptions().blocks({1, 0, 1})),
      c10::ValueError);
  EXPECT_THROW(
      revnet::RevNet(revnet::RevNetOptions().memory_budget(-1)),
      c10::ValueError);
}

/// A small network of each kind, for images of 8 x 8.
revnet::RevNetOptions small(bool bottleneck) {
  return revnet::RevNetOptions()
      .stem(8)
      .widths({8, 12, 16})
      .blocks({2, 2, 3})
      .bottleneck(bottleneck);
}

/// A way to run the small networks, each to be compared with its plain twin.
struct Kind {
  const char* name;
  bool bottleneck;
  revnet::Engine engine;
  int64_t memory_budget;
  bool checkpoint_transitions;

  revnet::RevNetOptions options() const {
    return small(bottleneck)
        .engine(engine)
        .memory_budget(memory_budget)
        .checkpoint_transitions(checkpoint_transitions);
  }
  revnet::RevNetOptions plain_options() const {
    return small(bottleneck).engine(revnet::Engine::kPlain);
  }

  friend std::ostream& operator<<(std::ostream& stream, const Kind& kind) {
    return stream << kind.name;
  }
};

constexpr Kind kKinds[] = {
    {"BasicSequence", false, revnet::Engine::kSequence, 0, false},
    {"BasicWrapper", false, revnet::Engine::kWrapper, 0, false},
    {"BasicBudget", false, revnet::Engine::kSequence, 150000, false},
    {"BasicCheckpoint", false, revnet::Engine::kSequence, 0, true},
    {"BottleneckSequence", true, revnet::Engine::kSequence, 0, false},
    {"BottleneckWrapper", true, revnet::Engine::kWrapper, 0, false},
    {"BottleneckWrapperCheckpoint", true, revnet::Engine::kWrapper, 0, true},
};

class RevNetKinds : public testing::TestWithParam<Kind> {};

/// The network of some options; always with the same weights.
revnet::RevNet seeded(const revnet::RevNetOptions& options) {
  torch::manual_seed(1);
  return revnet::RevNet(options);
}

TEST_P(RevNetKinds, HasTheWeightsOfItsPlainTwin) {
  const auto plain = seeded(GetParam().plain_options());
  const auto reversible = seeded(GetParam().options());
  const auto expected = plain->named_parameters();
  const auto parameters = reversible->named_parameters();
  EXPECT_EQ(parameters.keys(), expected.keys());
  for (const auto& item : parameters) {
    EXPECT_TRUE(torch::equal(item.value(), expected[item.key()])) << item.key();
  }
  EXPECT_EQ(reversible->named_buffers().keys(), plain->named_buffers().keys());
}

TEST_P(RevNetKinds, ReversibleEqualsPlainTwin) {
  auto plain = seeded(GetParam().plain_options());
  auto reversible = seeded(GetParam().options());
  plain->to(torch::kFloat64);
  reversible->to(torch::kFloat64);
  const auto images = torch::randn({6, 3, 8, 8}, torch::kFloat64);
  const auto labels = torch::arange(6);
  const auto loss_of = [&](revnet::RevNet& net) {
    auto loss = torch::nn::functional::cross_entropy(net(images), labels);
    loss.backward();
    return loss;
  };
  // Wrappers take both halves as one tensor: a BatchNorm sums over views then,
  // in another order.
  const auto same = [](const torch::Tensor& a, const torch::Tensor& b) {
    return GetParam().engine == revnet::Engine::kWrapper
        ? torch::allclose(a, b, 1e-12, 1e-14)
        : torch::equal(a, b);
  };
  EXPECT_TRUE(same(loss_of(plain), loss_of(reversible)));

  const auto expected = plain->named_parameters();
  for (const auto& item : reversible->named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_TRUE(torch::allclose(
        item.value().grad(), expected[item.key()].grad(), 1e-10, 1e-12))
        << item.key();
  }
  const auto buffers = plain->named_buffers();
  for (const auto& item : reversible->named_buffers()) {
    EXPECT_TRUE(same(item.value(), buffers[item.key()])) << item.key();
  }
}

TEST_P(RevNetKinds, WithFractionalBitsTrainsBitForBitLikeItsPlainTwin) {
  auto plain = seeded(GetParam().plain_options().fractional_bits(14));
  auto reversible = seeded(GetParam().options().fractional_bits(14));
  const auto images = torch::randn({6, 3, 8, 8});
  const auto labels = torch::arange(6);
  for (auto* net : {&plain, &reversible}) {
    torch::optim::SGD optimizer(
        (*net)->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      torch::nn::functional::cross_entropy((*net)(images), labels).backward();
      optimizer.step();
    }
  }
  const auto expected = plain->named_parameters();
  for (const auto& item : reversible->named_parameters()) {
    EXPECT_TRUE(torch::equal(item.value(), expected[item.key()])) << item.key();
  }
  const auto buffers = plain->named_buffers();
  for (const auto& item : reversible->named_buffers()) {
    EXPECT_TRUE(torch::equal(item.value(), buffers[item.key()])) << item.key();
  }
}

TEST_P(RevNetKinds, CloneIsDeep) {
  revnet::RevNet net(GetParam().options());
  const auto images = torch::randn({2, 3, 8, 8});
  net->eval();
  const auto before = net(images);
  const auto copy = std::dynamic_pointer_cast<revnet::RevNetImpl>(net->clone());
  copy->eval();
  EXPECT_TRUE(torch::equal(copy->forward(images), before));
  copy->train();
  copy->forward(images).sum().backward();
  for (const auto& item : copy->named_parameters()) {
    EXPECT_TRUE(item.value().grad().defined()) << item.key();
  }
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : copy->parameters()) {
      parameter.zero_();
    }
  }
  EXPECT_TRUE(torch::equal(net(images), before));
  for (const auto& item : net->named_parameters()) {
    EXPECT_FALSE(item.value().grad().defined()) << item.key();
  }
}

TEST_P(RevNetKinds, SurvivesSaveAndLoadBetweenTwins) {
  revnet::RevNet reversible(GetParam().options());
  revnet::RevNet plain(GetParam().plain_options());
  std::stringstream file;
  torch::save(reversible, file);
  torch::load(plain, file);
  reversible->eval();
  plain->eval();
  const auto images = torch::randn({2, 3, 8, 8});
  EXPECT_TRUE(torch::equal(plain(images), reversible(images)));
}

INSTANTIATE_TEST_SUITE_P(
    Networks,
    RevNetKinds,
    testing::ValuesIn(kKinds),
    [](const auto& instance) { return instance.param.name; });

TEST(RevNet, PrintsItsOptions) {
  std::ostringstream text;
  text << *revnet::RevNet(revnet::named("revnet164").fractional_bits(12));
  EXPECT_THAT(
      text.str(),
      StartsWith("revnet::RevNet(num_classes=10, stem=32, widths=[32, 64, "
                 "128], blocks=[9, 9, 9], bottleneck=true, engine=sequence, "
                 "fractional_bits=12, memory_budget=0, "
                 "checkpoint_transitions=false)"));
  text.str("");
  text << *resnet::ResNet(resnet::named("resnet32"));
  EXPECT_THAT(
      text.str(),
      StartsWith("resnet::ResNet(num_classes=10, stem=16, widths=[16, 32, 64], "
                 "blocks=[5, 5, 5], bottleneck=false)"));
}

/// Bytes that a network holds after forward.
int64_t held(const revnet::RevNetOptions& options) {
  revnet::RevNet net(options);
  const auto images = torch::randn({2, 3, 8, 8});
  net(images).sum().backward(); // a budget is planned in the first step
  const memcnn::AllocationMeter meter;
  const auto loss = net(images).sum();
  return meter.held_bytes();
}

revnet::RevNetOptions deep(int64_t blocks, revnet::Engine engine) {
  return revnet::RevNetOptions()
      .stem(8)
      .widths({8, 8, 8})
      .blocks({blocks, blocks, blocks})
      .engine(engine);
}

TEST(RevNet, HoldsTheSameMemoryHoweverDeep) {
  const int64_t plain = held(deep(12, revnet::Engine::kPlain));
  for (const auto engine :
       {revnet::Engine::kSequence, revnet::Engine::kWrapper}) {
    const int64_t most = held(deep(12, engine));
    EXPECT_LT(most - held(deep(6, engine)), most / 10) << engine;
    EXPECT_LT(most, plain / 4) << engine;
  }
}

TEST(RevNet, KeepsWhatTheMemoryBudgetOfEachGroupAllows) {
  const auto options = deep(12, revnet::Engine::kSequence);
  const int64_t least = held(options);
  const int64_t all = held(deep(12, revnet::Engine::kPlain)) - least;
  const auto kept = [&](int64_t budget) {
    return held(revnet::RevNetOptions(options).memory_budget(budget)) - least;
  };
  // The first group's blocks keep more than 3/4 of all.
  EXPECT_GT(kept(all / 3), all / 3);
  EXPECT_LT(kept(all / 3), all / 3 + all / 4);
  EXPECT_GT(kept(all), all * 9 / 10);
}

TEST(RevNet, HoldsLessWithCheckpointedTransitions) {
  const auto options = deep(2, revnet::Engine::kSequence);
  const int64_t images = 2 * 8 * 8 * 8 * 4; // bytes of the first group's output
  EXPECT_LT(
      held(revnet::RevNetOptions(options).checkpoint_transitions(true)),
      held(options) - images);
}

// --- training ---------------------------------------------------------------

TEST(Config, CutsTheLearningRateAtHalfAndThreeQuarters) {
  const Config config; // 80000 iterations
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 39999), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 40000), 0.01);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 59999), 0.01);
  EXPECT_DOUBLE_EQ(learning_rate_at(config, 60000), 0.001);
}

TEST(Checkpoint, ResumesBitForBit) {
  SyntheticSizes sizes;
  sizes.train = 12;
  sizes.test = 4;
  const auto data = make_synthetic(sizes);
  Config config;
  config.model = "revnet38";
  config.dataset = "synthetic";
  config.batch_size = 4;
  config.iterations = 4;
  memcnn::AllocationMeter meter;
  Trainer whole(config, data, torch::kCPU, meter);
  RunState state;
  for (int64_t i = 0; i < 2; ++i) {
    state.add(whole.step(i));
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
    EXPECT_EQ(resumed.step(i).loss, whole.step(i).loss);
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

TEST(Figures, CountTheFirstAndTheFirstFive) {
  // Row i has its labels' logit in place i of the order.
  const auto logits = torch::arange(7, 0, -1, torch::kFloat32).repeat({7, 1});
  const auto found =
      training::detail::figures(torch::tensor(0.5F), logits, torch::arange(7));
  const auto hits = training::detail::hits_of(found);
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
  EXPECT_FALSE(std::isfinite(trainer.step(0).loss));
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
      const StepResult step = trainer.step(i);
      EXPECT_GT(step.memory.held_after_forward, 0);
      EXPECT_GT(step.memory.peak, step.memory.held_after_forward);
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
  state.add(first.step(0));
  const auto bytes = make_checkpoint(config_, /*fingerprint=*/7, state, first);
  Trainer second(config_, data_, torch::kCUDA, meter);
  restore_checkpoint(bytes, "a file", config_, 7, second);
  EXPECT_NEAR(second.step(1).loss, first.step(1).loss, 1e-3);
}

TEST_F(TrainerCuda, ReadsFiguresWhileTheDeviceGoesOn) {
  const auto values = torch::arange(3, torch::kFloat64).to(torch::kCUDA);
  const DeviceRead read(values);
  values.add_(1); // queued after the copy
  EXPECT_TRUE(torch::equal(read.wait(), torch::arange(3, torch::kFloat64)));
}

} // namespace
