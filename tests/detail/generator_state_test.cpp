// SPDX-License-Identifier: MIT

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/detail/generator_state.h>
#include <torch/torch.h>

#include <functional>
#include <string>

namespace memcnn_test {
namespace {

using memcnn::detail::GeneratorState;

struct Draw {
  std::string name;
  std::function<torch::Tensor()> numbers;
};

/// Draws of each kind of state: whole words, and normal numbers, of which the
/// second of a pair waits for the next draw.
class DefaultGenerator : public testing::TestWithParam<Draw> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    torch::rand({3});
  }
};

INSTANTIATE_TEST_SUITE_P(
    Draws,
    DefaultGenerator,
    testing::Values(
        Draw{
            "One",
            [] {
              return torch::rand({1});
            }},
        Draw{
            "WholeRound",
            [] {
              return torch::rand({624});
            }},
        Draw{
            "Normal",
            [] {
              return torch::randn({1});
            }},
        Draw{
            "NormalDouble",
            [] {
              return torch::randn({1}, torch::kDouble);
            }},
        Draw{
            "Permutation",
            [] {
              return torch::randperm(5);
            }},
        Draw{
            "Seed",
            [] {
              return torch::manual_seed(2), torch::ones({1});
            }}),
    [](const auto& test) { return test.param.name; });

TEST_P(DefaultGenerator, GoesOnFromARestoredState) {
  torch::randn({1}); // the second of this pair is part of the state
  torch::randn({1}, torch::kDouble);
  const GeneratorState before = GeneratorState::now(torch::kCPU);
  const torch::Tensor numbers = GetParam().numbers();
  const torch::Tensor next = torch::randn({3});
  before.restore();
  EXPECT_TRUE(before == GeneratorState::now(torch::kCPU));
  EXPECT_TRUE(GetParam().numbers().equal(numbers));
  EXPECT_TRUE(torch::randn({3}).equal(next));
}

TEST_P(DefaultGenerator, DrawIsSeen) {
  const GeneratorState before = GeneratorState::now(torch::kCPU);
  EXPECT_TRUE(before == GeneratorState::now(torch::kCPU));
  EXPECT_EQ(before.hash(), GeneratorState::now(torch::kCPU).hash());
  GetParam().numbers();
  EXPECT_FALSE(before == GeneratorState::now(torch::kCPU));
  EXPECT_NE(before.hash(), GeneratorState::now(torch::kCPU).hash());
}

TEST(DefaultGeneratorState, IsThatOfLibTorch) {
  torch::manual_seed(3);
  torch::randn({1});
  auto generator = torch::globalContext().defaultGenerator(torch::kCPU);
  const torch::Tensor state = generator.get_state();
  const GeneratorState seen = GeneratorState::now(torch::kCPU);
  torch::randn({5});
  seen.restore();
  EXPECT_TRUE(generator.get_state().equal(state));
}

} // namespace
} // namespace memcnn_test
