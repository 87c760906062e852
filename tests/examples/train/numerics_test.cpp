// SPDX-License-Identifier: MIT

// What the training program measures of a network's accuracy, and whether it
// finds where NaN comes from.

#include "train/numerics/numerics.h"
#include "train/base/config.h"
#include "train/numerics/blocks.h"
#include "train/numerics/non_finite.h"
#include "train/numerics/warnings.h"

#include <gtest/gtest.h>
#include <memcnn/allocation_meter.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace training;

/// A network for images of 8 x 8: trunk.0 is a run of 2 blocks, trunk.2 of 1
/// and trunk.4 of 2; trunk.1 and trunk.3 change the shape.
revnet::RevNetOptions small() {
  return revnet::RevNetOptions().stem(8).widths({8, 12, 16}).blocks({2, 2, 3});
}

revnet::RevNet seeded(const revnet::RevNetOptions& options) {
  torch::manual_seed(1);
  return revnet::RevNet(options);
}

revnet::RevNet seeded_resnet() {
  return seeded(
      revnet::RevNetOptions().reversible(false).stem(8).widths({8, 12}).blocks(
          {2, 2}));
}

Batch small_batch() {
  torch::manual_seed(2);
  return {torch::randn({6, 3, 8, 8}), torch::arange(6)};
}

/// The weights of the last convolution of a block's F.
torch::Tensor last_weights_of(
    const torch::nn::Module& network,
    const std::string& block) {
  return network.named_parameters()[block + ".Fm.5.weight"];
}

void fill(torch::Tensor weights, double value) {
  const torch::NoGradGuard no_grad;
  weights.fill_(value);
}

std::vector<std::string> reversible_paths() {
  return {
      "trunk.0.blocks.0",
      "trunk.0.blocks.1",
      "trunk.2.blocks.0",
      "trunk.4.blocks.0",
      "trunk.4.blocks.1"};
}

// --- blocks.h ----------------------------------------------------------------

TEST(Blocks, OfRevNetHaveThePathsOfTheirParameters) {
  auto net = seeded(small());
  std::vector<std::string> names;
  for (const auto& block : blocks_of(*net)) {
    names.push_back(block.name());
    bool found = false;
    for (const auto& name : net->named_parameters().keys()) {
      found = found || name.rfind(block.path + ".", 0) == 0;
    }
    EXPECT_TRUE(found) << block.path;
  }
  EXPECT_EQ(
      names,
      (std::vector<std::string>{
          "stem",
          "trunk.0.blocks.0 (AdditiveCoupling)",
          "trunk.0.blocks.1 (AdditiveCoupling)",
          "trunk.1 (ResidualBlock)",
          "trunk.2.blocks.0 (AdditiveCoupling)",
          "trunk.3 (ResidualBlock)",
          "trunk.4.blocks.0 (AdditiveCoupling)",
          "trunk.4.blocks.1 (AdditiveCoupling)",
          "head"}));
}

TEST(Blocks, OfResNetAreNamed) {
  auto net = seeded_resnet();
  std::vector<std::string> names;
  for (const auto& block : blocks_of(*net)) {
    names.push_back(block.name());
    EXPECT_FALSE(block.is_reversible());
  }
  EXPECT_EQ(
      names,
      (std::vector<std::string>{
          "stem",
          "trunk.0 (ResidualBlock)",
          "trunk.1 (ResidualBlock)",
          "trunk.2 (ResidualBlock)",
          "trunk.3 (ResidualBlock)",
          "head"}));
}

TEST(Blocks, OneAfterTheOtherAreTheNetwork) {
  const auto check = [](auto net) {
    const torch::NoGradGuard no_grad;
    const auto images = small_batch().images;
    auto x = images;
    for (const auto& block : blocks_of(*net)) {
      x = block.forward(x);
    }
    EXPECT_TRUE(torch::equal(x, net(images)));
  };
  check(seeded(small()));
  check(seeded(small().engine(revnet::Engine::kWrapper)));
  check(seeded_resnet());
}

// --- numerics.h ----------------------------------------------------------------

class NumericsOfEngine : public testing::TestWithParam<revnet::Engine> {
 protected:
  revnet::RevNetOptions options() const {
    return small().engine(GetParam());
  }
};

TEST_P(NumericsOfEngine, AreRoundingErrorsInFloat64) {
  auto net = seeded(options());
  net->to(torch::kFloat64);
  auto batch = small_batch();
  batch.images = batch.images.to(torch::kFloat64);
  const auto report = measure_numerics(*net, batch);

  ASSERT_EQ(report.inverse_errors.size(), reversible_paths().size());
  for (size_t i = 0; i < report.inverse_errors.size(); ++i) {
    EXPECT_EQ(report.inverse_errors[i].name, reversible_paths()[i]);
    EXPECT_LT(report.inverse_errors[i].relative, 1e-13);
    EXPECT_GT(report.inverse_errors[i].relative, 0);
  }
  EXPECT_LT(report.gradient.relative, 1e-10) << report.gradient.name;
  EXPECT_GT(report.gradient.relative, 0);
  EXPECT_TRUE(net->named_parameters().contains(report.gradient.name));
}

TEST_P(NumericsOfEngine, AreSmallInFloat32) {
  const auto report = measure_numerics(*seeded(options()), small_batch());
  EXPECT_GT(report.inverse().relative, 1e-9);
  EXPECT_LT(report.inverse().relative, 1e-5);
  EXPECT_GT(report.gradient.relative, 1e-9);
  EXPECT_LT(report.gradient.relative, 1e-3);
}

TEST_P(NumericsOfEngine, AreZeroWithFractionalBits) {
  const auto report =
      measure_numerics(*seeded(options().fractional_bits(14)), small_batch());
  for (const auto& error : report.inverse_errors) {
    EXPECT_EQ(error.relative, 0) << error.name;
  }
  EXPECT_EQ(report.gradient.relative, 0) << report.gradient.name;
}

TEST_P(NumericsOfEngine, NameTheBlockThatLosesItsInput) {
  auto net = seeded(options());
  fill(last_weights_of(*net, "trunk.4.blocks.0"), 1e4);
  const auto report = measure_numerics(*net, small_batch());
  EXPECT_EQ(report.inverse().name, "trunk.4.blocks.0");
  EXPECT_GT(report.inverse().relative, 1e-3);
  EXPECT_LT(report.inverse_errors.back().relative, 1e-5) << "the block after";
}

TEST_P(NumericsOfEngine, AddUpAlongTheRun) {
  // Where a block loses its input, so do the blocks before it in its run, and
  // their gradients are wrong; other runs start from outputs of their own.
  auto net = seeded(options());
  fill(last_weights_of(*net, "trunk.0.blocks.1"), 1e4);
  const auto report = measure_numerics(*net, small_batch());
  EXPECT_GT(report.inverse_errors[1].relative, 1e-3);
  EXPECT_GT(report.inverse_errors[0].relative, 1e-3);
  EXPECT_LT(report.inverse_errors[2].relative, 1e-5);
  EXPECT_GT(report.gradient.relative, 1e-2);
  EXPECT_EQ(report.gradient.name.rfind("trunk.0.blocks.0.", 0), 0U)
      << report.gradient.name;
}

TEST_P(NumericsOfEngine, AreMeasuredUnderAutocast) {
  auto net = seeded(options());
  const auto full = measure_numerics(*net, small_batch());
  const auto half = measure_numerics(*net, small_batch(), /*autocast=*/true);
  EXPECT_GT(half.inverse().relative, 100 * full.inverse().relative);
  EXPECT_LT(half.inverse().relative, 0.1);
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST_P(NumericsOfEngine, AreNoWorseThanBfloat16ItselfUnderAutocast) {
  // What recomputation adds is below what bfloat16 takes from plain gradients.
  auto net = seeded(options());
  const auto batch = small_batch();
  const auto plain_gradients = [&](bool autocast) {
    const support::AutocastGuard guard(at::kCPU, autocast);
    const auto values =
        training::detail::run_with_kept_inputs(blocks_of(*net), batch.images);
    return training::detail::gradients_of(
        training::loss_of(values.back(), batch.labels), *net);
  };
  const auto of_bfloat16 = training::detail::largest_deviation(
      *net, plain_gradients(true), plain_gradients(false));
  const auto report = measure_numerics(*net, batch, /*autocast=*/true);
  EXPECT_LT(report.gradient.relative, of_bfloat16.relative);
}

INSTANTIATE_TEST_SUITE_P(
    Engines,
    NumericsOfEngine,
    testing::Values(revnet::Engine::kSequence, revnet::Engine::kWrapper),
    [](const auto& test) {
      return test.param == revnet::Engine::kSequence ? "Sequence" : "Wrapper";
    });

TEST(Numerics, CompareWithTheGradientsOfPlainAutograd) {
  // Of a network that runs under plain autograd itself nothing is off, not even
  // by the order in which a batch normalisation sums.
  for (const auto dtype : {torch::kFloat32, torch::kFloat64}) {
    const memcnn::PlainAutogradGuard guard;
    auto net = seeded(small());
    net->to(dtype);
    auto batch = small_batch();
    batch.images = batch.images.to(dtype);
    const auto report = measure_numerics(*net, batch);
    EXPECT_EQ(report.gradient.relative, 0) << report.gradient.name;
  }
}

TEST(Numerics, AreThoseOfTrainMode) {
  auto net = seeded(small()); // eval mode is what an evaluation leaves behind
  const auto expected = to_json(measure_numerics(*net, small_batch()));
  net->eval();
  EXPECT_EQ(to_json(measure_numerics(*net, small_batch())), expected);
}

TEST(Numerics, LeaveNoTrace) {
  auto net = seeded(small().memory_budgets({150000, 150000, 150000}));
  const auto batch = small_batch();
  training::loss_of(net(batch.images), batch.labels).backward();
  net->eval();
  net->head->train();
  std::vector<torch::Tensor> values = net->parameters();
  for (const auto& parameter : net->parameters()) {
    values.push_back(parameter.grad());
  }
  for (const auto& buffer : net->buffers()) {
    values.push_back(buffer);
  }
  std::vector<torch::Tensor> copies;
  std::vector<int64_t> versions;
  for (const auto& value : values) {
    copies.push_back(value.detach().clone());
    versions.push_back(value._version());
  }
  torch::manual_seed(7);
  const auto drawn = torch::rand({4});
  torch::manual_seed(7);

  measure_numerics(*net, batch);

  EXPECT_TRUE(torch::equal(torch::rand({4}), drawn)) << "the generator";
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_TRUE(torch::equal(values[i], copies[i])) << i;
    EXPECT_EQ(values[i]._version(), versions[i]) << i;
  }
  for (const auto& parameter : net->parameters()) {
    EXPECT_TRUE(parameter.grad().defined());
  }
  EXPECT_FALSE(net->stem->is_training());
  EXPECT_FALSE(net->trunk->is_training());
  EXPECT_TRUE(net->head->is_training());
}

TEST(Numerics, TakeLessMemoryThanAPlainStep) {
  const auto options = small().stem(16).widths({16, 16, 16}).blocks({9, 9, 9});
  const auto batch = small_batch();
  auto plain = seeded(options);
  const auto reversible = seeded(options);
  memcnn::AllocationMeter meter;
  {
    const memcnn::PlainAutogradGuard guard;
    training::loss_of(plain(batch.images), batch.labels).backward();
  }
  const int64_t plain_peak = meter.peak_bytes();
  const int64_t before = meter.held_bytes();
  meter.reset_peak();
  measure_numerics(*reversible, batch);
  EXPECT_LT(meter.peak_bytes() - before, plain_peak);
  EXPECT_EQ(meter.held_bytes(), before) << "nothing stays";
}

TEST(Numerics, OfNanAreTheLargest) {
  NumericsReport report;
  report.inverse_errors = {
      {"a", 1}, {"b", std::numeric_limits<double>::quiet_NaN()}, {"c", 2}};
  EXPECT_EQ(report.inverse().name, "b");
}

TEST(Numerics, OfNetworkWithNanAreNan) {
  auto net = seeded(small());
  fill(last_weights_of(*net, "trunk.4.blocks.0"), NAN);
  const auto report = measure_numerics(*net, small_batch());
  EXPECT_TRUE(std::isnan(report.inverse().relative));
  EXPECT_TRUE(std::isnan(report.gradient.relative));
  EXPECT_TRUE(to_json(report).dump().rfind("{\"inverse_error\":null,", 0) == 0)
      << to_json(report).dump();
}

TEST(Numerics, AreLoggedByName) {
  NumericsReport report;
  report.inverse_errors = {{"trunk.0.blocks.0", 0.5}, {"trunk.0.blocks.1", 0}};
  report.gradient = {"stem.0.weight", 0.25};
  EXPECT_EQ(
      to_json(report).dump(),
      "{\"inverse_error\":0.5,\"inverse_error_block\":\"trunk.0.blocks.0\","
      "\"gradient_deviation\":0.25,"
      "\"gradient_deviation_parameter\":\"stem.0.weight\","
      "\"inverse_errors\":[{\"block\":\"trunk.0.blocks.0\",\"error\":0.5},"
      "{\"block\":\"trunk.0.blocks.1\",\"error\":0.0}]}");
}

TEST(Numerics, WarnBeyondTheLimits) {
  Config config;
  NumericsReport report;
  report.inverse_errors = {{"trunk.0.blocks.0", 1e-3}};
  report.gradient = {"stem.0.weight", 5e-2};
  EXPECT_TRUE(warnings_of(report, config, 20).empty());

  report.inverse_errors[0].relative = 0.002;
  report.gradient.relative = NAN;
  EXPECT_EQ(
      warnings_of(report, config, 20),
      (std::vector<std::string>{
          "expected the rebuilt input of a block to be off by at most 0.001 of "
          "its size, but got 0.002 at trunk.0.blocks.0 after iteration 20. "
          "Give --fractional-bits 14, with which blocks are undone exactly, or "
          "a lower --learning-rate (now 0.1).",
          "expected a gradient to be off by at most 0.05 of its size, but got "
          "nan at stem.0.weight after iteration 20. Give --fractional-bits 14, "
          "with which blocks are undone exactly, or a lower --learning-rate "
          "(now 0.1)."}));

  config.amp = true; // bfloat16 has 8 digits
  report.gradient.relative = 0.9;
  EXPECT_TRUE(warnings_of(report, config, 20).empty());
  report.inverse_errors[0].relative = 0.6;
  EXPECT_EQ(
      warnings_of(report, config, 20),
      (std::vector<std::string>{
          "expected the rebuilt input of a block to be off by at most 0.5 of "
          "its size, but got 0.6 at trunk.0.blocks.0 after iteration 20. Give "
          "no --amp, or a lower --learning-rate (now 0.1)."}));
}

// --- non_finite.h --------------------------------------------------------------

TEST(NonFinite, WeightIsNamed) {
  auto net = seeded(small());
  fill(last_weights_of(*net, "trunk.2.blocks.0").view(-1)[3], NAN);
  EXPECT_EQ(
      origin_of_non_finite(*net, small_batch()),
      "the weights trunk.2.blocks.0.Fm.5.weight (1 of 81 parameters are "
      "not finite)");
}

TEST(NonFinite, RunningStatisticIsNamedWhereItIsUsed) {
  auto net = seeded(small());
  auto mean = net->named_buffers()["trunk.2.blocks.0.Fm.0.running_mean"];
  fill(mean, NAN);
  const std::string in_the_loss = "the loss, which is made of finite logits";
  EXPECT_EQ(origin_of_non_finite(*net, small_batch()), in_the_loss)
      << "train mode takes the batch's own";
  net->eval();
  EXPECT_EQ(
      origin_of_non_finite(*net, small_batch()),
      "the running statistics trunk.2.blocks.0.Fm.0.running_mean (1 of " +
          std::to_string(net->named_buffers().size()) +
          " buffers are not finite)");
  fill(mean, 0);
  fill(net->named_buffers()["trunk.2.blocks.0.Fm.0.running_var"], -1);
  EXPECT_EQ(
      origin_of_non_finite(*net, small_batch()),
      "the output of trunk.2.blocks.0 (AdditiveCoupling)");
}

TEST(NonFinite, FirstBlockThatMakesItIsNamed) {
  for (const std::string block :
       {"trunk.0.blocks.1", "trunk.2.blocks.0", "trunk.4.blocks.1"}) {
    auto net = seeded(small());
    fill(last_weights_of(*net, block), 3e38); // finite, but its sums are not
    EXPECT_EQ(
        origin_of_non_finite(*net, small_batch()),
        "the output of " + block + " (AdditiveCoupling)");
  }
}

TEST(NonFinite, BlockOfResNetIsNamed) {
  auto net = seeded_resnet();
  fill(net->named_parameters()["trunk.2.branch.5.weight"], 3e38);
  EXPECT_EQ(
      origin_of_non_finite(*net, small_batch()),
      "the output of trunk.2 (ResidualBlock)");
}

TEST(NonFinite, ImageIsNamed) {
  auto batch = small_batch();
  batch.images[1][2][3][4] = INFINITY;
  EXPECT_EQ(
      origin_of_non_finite(*seeded(small()), batch), "the images of the batch");
}

TEST(NonFinite, IsInTheLossWhereLogitsAreFinite) {
  EXPECT_EQ(
      origin_of_non_finite(*seeded(small()), small_batch()),
      "the loss, which is made of finite logits");
}

TEST(NonFinite, SearchLeavesNoTrace) {
  auto net = seeded(small());
  const auto batch = small_batch();
  std::vector<torch::Tensor> copies;
  for (const auto& buffer : net->buffers()) {
    copies.push_back(buffer.clone());
  }
  torch::manual_seed(7);
  const auto drawn = torch::rand({4});
  torch::manual_seed(7);
  origin_of_non_finite(*net, batch);
  EXPECT_TRUE(torch::equal(torch::rand({4}), drawn));
  const auto buffers = net->buffers();
  for (size_t i = 0; i < buffers.size(); ++i) {
    EXPECT_TRUE(torch::equal(buffers[i], copies[i])) << i;
  }
}

} // namespace
