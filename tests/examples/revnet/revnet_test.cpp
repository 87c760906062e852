// SPDX-License-Identifier: MIT

#include "revnet/revnet.h"

#include <memcnn/allocation_meter.h>
#include "support/throws_error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <ostream>
#include <sstream>
#include <string>

namespace {

using memcnn_test::ThrowsError;
using testing::StartsWith;
using testing::StrEq;

int64_t parameter_count(const std::string& name, int64_t num_classes) {
  const revnet::RevNet net(revnet::named(name).num_classes(num_classes));
  int64_t count = 0;
  for (const auto& parameter : net->parameters()) {
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
  EXPECT_THAT(
      [] { revnet::named("revnet39"); },
      ThrowsError<c10::ValueError>(
          StrEq("revnet::named(): expected a name out of resnet32 resnet110 "
                "resnet164 revnet38 revnet110 revnet164, but got "
                "\"revnet39\".")));
}

/// A network of these options is an error that says so.
void expect_rejected(
    const revnet::RevNetOptions& options,
    const std::string& expected) {
  EXPECT_THAT(
      [&] { revnet::RevNet net(options); },
      ThrowsError<c10::ValueError>(StartsWith(
          "RevNet::reset(): expected " + expected +
          ", but got num_classes=10, stem=")));
}

TEST(Networks, RejectUnequalGroups) {
  const std::string expected = "as many entries in blocks as in widths";
  expect_rejected(revnet::RevNetOptions().blocks({1, 1}), expected);
  expect_rejected(revnet::named("resnet32").blocks({1, 1}), expected);
  expect_rejected(
      revnet::RevNetOptions().memory_budgets({1, 1}),
      "as many entries in memory_budgets as in widths, or none");
}

TEST(Networks, RejectOptionsOutOfRange) {
  expect_rejected(
      revnet::RevNetOptions().blocks({1, 0, 1}),
      "1 or more blocks in each group");
  expect_rejected(
      revnet::RevNetOptions().memory_budgets({0, -1, 0}), "no negative budget");
}

TEST(Networks, RejectOddChannelsWhereCouplingsHalveThem) {
  const std::string expected =
      "an even stem and even widths, which couplings halve";
  expect_rejected(revnet::RevNetOptions().stem(31), expected);
  expect_rejected(revnet::RevNetOptions().widths({32, 63, 112}), expected);
  const auto images = torch::randn({2, 3, 8, 8});
  revnet::RevNet odd(
      revnet::RevNetOptions().reversible(false).stem(3).widths({3, 5, 7}));
  EXPECT_EQ(odd(images).sizes(), torch::IntArrayRef({2, 10}));
}

TEST(Networks, RejectOptionsOfReversibleBlocksWhereThereAreNone) {
  const auto resnet = revnet::named("resnet32");
  const std::string expected =
      "reversible(true) with kWrapper, fractional_bits or memory_budgets";
  using Options = revnet::RevNetOptions;
  expect_rejected(Options(resnet).engine(revnet::Engine::kWrapper), expected);
  expect_rejected(Options(resnet).fractional_bits(14), expected);
  expect_rejected(Options(resnet).memory_budgets({1, 1, 1}), expected);
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
  bool reversible = true;

  revnet::RevNetOptions options() const {
    auto options = plain_options().engine(engine).checkpoint_transitions(
        checkpoint_transitions);
    return memory_budget == 0
        ? options
        : options.memory_budgets({memory_budget, memory_budget, memory_budget});
  }
  revnet::RevNetOptions plain_options() const {
    return small(bottleneck).reversible(reversible);
  }

  friend std::ostream& operator<<(std::ostream& stream, const Kind& kind) {
    return stream << kind.name;
  }
};

constexpr Kind kReversible[] = {
    {"BasicSequence", false, revnet::Engine::kSequence, 0, false},
    {"BasicWrapper", false, revnet::Engine::kWrapper, 0, false},
    {"BasicBudget", false, revnet::Engine::kSequence, 150000, false},
    {"BasicCheckpoint", false, revnet::Engine::kSequence, 0, true},
    {"BottleneckSequence", true, revnet::Engine::kSequence, 0, false},
    {"BottleneckWrapper", true, revnet::Engine::kWrapper, 0, false},
    {"BottleneckWrapperCheckpoint", true, revnet::Engine::kWrapper, 0, true},
};

constexpr Kind kResidual[] = {
    {"Basic", false, revnet::Engine::kSequence, 0, false, false},
    {"BottleneckCheckpoint", true, revnet::Engine::kSequence, 0, true, false},
};

class RevNetKinds : public testing::TestWithParam<Kind> {};

class ReversibleKinds : public RevNetKinds {};

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
  const auto loss_of = [&](revnet::RevNet& net, bool as_plain = false) {
    const memcnn::PlainAutogradGuard guard(as_plain);
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
  EXPECT_TRUE(same(loss_of(plain, /*as_plain=*/true), loss_of(reversible)));

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

TEST_P(ReversibleKinds, WithFractionalBitsTrainsBitForBitLikeItsPlainTwin) {
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

constexpr auto name_of = [](const auto& instance) {
  return instance.param.name;
};

INSTANTIATE_TEST_SUITE_P(
    RevNets,
    RevNetKinds,
    testing::ValuesIn(kReversible),
    name_of);
INSTANTIATE_TEST_SUITE_P(
    ResNets,
    RevNetKinds,
    testing::ValuesIn(kResidual),
    name_of);
INSTANTIATE_TEST_SUITE_P(
    RevNets,
    ReversibleKinds,
    testing::ValuesIn(kReversible),
    name_of);

TEST(RevNet, PrintsItsOptions) {
  std::ostringstream text;
  text << *revnet::RevNet(revnet::named("revnet164").fractional_bits(12));
  EXPECT_THAT(
      text.str(),
      StartsWith("revnet::RevNet(num_classes=10, stem=32, widths=[32, 64, "
                 "128], blocks=[9, 9, 9], bottleneck=true, "
                 "checkpoint_transitions=false, reversible=true, "
                 "engine=sequence, memory_budgets=[], fractional_bits=12)"));
  text.str("");
  text << *revnet::RevNet(revnet::named("resnet32"));
  EXPECT_THAT(
      text.str(),
      StartsWith("revnet::RevNet(num_classes=10, stem=16, widths=[16, 32, 64], "
                 "blocks=[5, 5, 5], bottleneck=false, "
                 "checkpoint_transitions=false, reversible=false)"));
}

/// Bytes that a network holds after forward.
int64_t held(const revnet::RevNetOptions& options, bool as_plain = false) {
  const memcnn::PlainAutogradGuard guard(as_plain);
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
  const int64_t plain =
      held(deep(12, revnet::Engine::kSequence), /*as_plain=*/true);
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
  const int64_t all = held(options, /*as_plain=*/true) - least;
  const auto kept = [&](int64_t budget) {
    return held(revnet::RevNetOptions(options).memory_budgets(
               {budget, budget, budget})) -
        least;
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

} // namespace
