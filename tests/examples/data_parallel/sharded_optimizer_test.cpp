// SPDX-License-Identifier: MIT

#include "data_parallel/sharded_optimizer.h"

#include "support/throws_error.h"
#include "support/twins.h"
#include "thread_ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using memcnn_test::all_equal;
using memcnn_test::Group;
using memcnn_test::run_ranks;
using memcnn_test::ThrowsError;
using parallel::ShardedOptimizer;
using testing::StartsWith;
using torch::Tensor;
using torch::optim::OptimizerParamGroup;
using Tensors = std::vector<Tensor>;

/// The same ones in every call: threads share the default generator.
Tensors draw(const std::vector<std::vector<int64_t>>& sizes, int seed) {
  const auto generator = at::detail::createCPUGenerator(seed);
  Tensors drawn;
  for (const auto& size : sizes) {
    drawn.push_back(torch::randn(size, generator));
  }
  return drawn;
}

const std::vector<std::vector<int64_t>> kSizes =
    {{3, 2}, {40}, {5, 4, 3}, {7}, {}, {20, 2}};

Tensors make_parameters(const std::vector<std::vector<int64_t>>& sizes) {
  Tensors parameters = draw(sizes, /*seed=*/1);
  for (Tensor& parameter : parameters) {
    parameter.requires_grad_();
  }
  return parameters;
}

/// The gradients of a step, the same on all ranks, as averages are.
void set_gradients(Tensors& parameters, int step) {
  std::vector<std::vector<int64_t>> sizes;
  for (const Tensor& parameter : parameters) {
    sizes.push_back(parameter.sizes().vec());
  }
  const Tensors gradients = draw(sizes, 100 + step);
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].mutable_grad() = gradients[i];
  }
}

/// Two groups, of which the second has a learning rate of its own.
template <class Options>
std::vector<OptimizerParamGroup> groups_of(
    const Tensors& parameters,
    const Options& options) {
  Options other = options;
  other.lr(0.003);
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(Tensors(parameters.begin(), parameters.begin() + 2));
  groups.emplace_back(
      Tensors(parameters.begin() + 2, parameters.end()),
      std::make_unique<Options>(other));
  return groups;
}

/// Steps `from` to `to` with a learning rate that falls after each.
void train(torch::optim::Optimizer& optimizer, Tensors& p, int from, int to) {
  torch::optim::StepLR schedule(optimizer, 1, 0.5);
  for (int step = from; step < to; ++step) {
    set_gradients(p, step);
    optimizer.step();
    schedule.step();
  }
}

/// After five steps on that many ranks.
template <class Inner, class Options>
void expect_the_weights_of(const Options& options, int ranks) {
  Tensors expected = make_parameters(kSizes);
  Inner whole(groups_of(expected, options), options);
  train(whole, expected, 0, 5);
  run_ranks(ranks, [&](const Group& group) {
    Tensors found = make_parameters(kSizes);
    ShardedOptimizer<Inner> sharded(groups_of(found, options), options, group);
    train(sharded, found, 0, 5);
    EXPECT_TRUE(all_equal(found, expected)) << group->getRank();
  });
}

class ShardedOptimizerOn : public testing::TestWithParam<int> {};

TEST_P(ShardedOptimizerOn, SgdGivesTheWeightsOfOneRank) {
  expect_the_weights_of<torch::optim::SGD>(
      torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(0.01),
      GetParam());
}

TEST_P(ShardedOptimizerOn, AdamGivesTheWeightsOfOneRank) {
  expect_the_weights_of<torch::optim::Adam>(
      torch::optim::AdamOptions(0.01).amsgrad(true), GetParam());
}

TEST_P(ShardedOptimizerOn, AdamWGivesTheWeightsOfOneRank) {
  expect_the_weights_of<torch::optim::AdamW>(
      torch::optim::AdamWOptions(0.01), GetParam());
}

size_t state_bytes(const torch::optim::Adam& optimizer) {
  size_t bytes = 0;
  for (const auto& entry : optimizer.state()) {
    const auto& state =
        static_cast<const torch::optim::AdamParamState&>(*entry.second);
    bytes += state.exp_avg().nbytes() + state.exp_avg_sq().nbytes();
  }
  return bytes;
}

TEST_P(ShardedOptimizerOn, KeepsItsShareOfTheState) {
  const std::vector<std::vector<int64_t>> sizes(6, {64, 64});
  run_ranks(GetParam(), [&](const Group& group) {
    Tensors parameters = make_parameters(sizes);
    ShardedOptimizer<torch::optim::Adam> sharded(
        parameters, torch::optim::AdamOptions(), group);
    train(sharded, parameters, 0, 2);
    const size_t whole = 2 * 6 * parameters[0].nbytes();
    EXPECT_EQ(state_bytes(sharded.share()), whole / group->getSize());
  });
}

TEST_P(ShardedOptimizerOn, LeavesRanksWithoutAParameter) {
  const std::vector<std::vector<int64_t>> sizes = {{3}};
  const torch::optim::AdamOptions options(0.01);
  Tensors expected = make_parameters(sizes);
  torch::optim::Adam whole(expected, options);
  train(whole, expected, 0, 3);
  run_ranks(GetParam(), [&](const Group& group) {
    Tensors found = make_parameters(sizes);
    ShardedOptimizer<torch::optim::Adam> sharded(found, options, group);
    train(sharded, found, 0, 3);
    EXPECT_EQ(sharded.gathered() != nullptr, group->getRank() == 0);
    EXPECT_TRUE(all_equal(found, expected));
  });
}

INSTANTIATE_TEST_SUITE_P(
    Ranks,
    ShardedOptimizerOn,
    testing::Values(2, 3),
    testing::PrintToStringParamName());

/// Weights and the optimiser's file after some steps.
struct Saved {
  Tensors weights;
  std::string file;
};

Saved save(const Tensors& weights, const torch::optim::Optimizer& optimizer) {
  Saved saved;
  for (const Tensor& weight : weights) {
    saved.weights.push_back(weight.detach().clone());
  }
  std::ostringstream stream;
  torch::save(optimizer, stream);
  saved.file = stream.str();
  return saved;
}

void load(
    const Saved& saved,
    Tensors& weights,
    torch::optim::Optimizer& optimizer) {
  const torch::NoGradGuard no_grad;
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].copy_(saved.weights[i]);
  }
  std::istringstream stream(saved.file);
  torch::load(optimizer, stream);
}

const torch::optim::AdamOptions kAdam = torch::optim::AdamOptions(0.01);

/// Three steps on that many ranks.
Saved saved_by(int ranks) {
  Saved saved;
  run_ranks(ranks, [&](const Group& group) {
    Tensors weights = make_parameters(kSizes);
    ShardedOptimizer<torch::optim::Adam> sharded(
        groups_of(weights, kAdam), kAdam, group);
    train(sharded, weights, 0, 3);
    if (const auto whole = sharded.gathered()) {
      saved = save(weights, *whole);
    }
    train(sharded, weights, 3, 4); // gathering changes nothing
  });
  return saved;
}

TEST(ShardedOptimizer, FileIsThatOfOneRank) {
  Tensors weights = make_parameters(kSizes);
  torch::optim::Adam one(groups_of(weights, kAdam), kAdam);
  train(one, weights, 0, 3);
  const Saved saved = saved_by(/*ranks=*/2);
  EXPECT_TRUE(all_equal(saved.weights, weights));

  Tensors loaded_weights = make_parameters(kSizes);
  torch::optim::Adam loaded(groups_of(loaded_weights, kAdam), kAdam);
  load(saved, loaded_weights, loaded);
  EXPECT_EQ(loaded.param_groups()[1].options().get_lr(), 0.003 / 4);
  train(one, weights, 3, 6);
  train(loaded, loaded_weights, 3, 6);
  EXPECT_TRUE(all_equal(loaded_weights, weights));
}

TEST(ShardedOptimizer, GoesOnWithAnotherNumberOfRanks) {
  Tensors weights = make_parameters(kSizes);
  torch::optim::Adam one(groups_of(weights, kAdam), kAdam);
  train(one, weights, 0, 3);
  train(one, weights, 3, 6);
  const Saved saved = saved_by(/*ranks=*/3);
  for (const int ranks : {1, 2, 3}) {
    run_ranks(ranks, [&](const Group& group) {
      Tensors found = make_parameters(kSizes);
      ShardedOptimizer<torch::optim::Adam> sharded(
          groups_of(found, kAdam), kAdam, group);
      train(sharded, found, 10, 11); // state that loading replaces
      load(saved, found, sharded);
      EXPECT_EQ(sharded.param_groups()[0].options().get_lr(), 0.01 / 4);
      train(sharded, found, 3, 6);
      EXPECT_TRUE(all_equal(found, weights)) << ranks;
    });
  }
}

TEST(ShardedOptimizer, RunsAloneWithoutAGroup) {
  Tensors expected = make_parameters(kSizes);
  torch::optim::Adam one(expected, kAdam);
  train(one, expected, 0, 3);
  Tensors found = make_parameters(kSizes);
  ShardedOptimizer<torch::optim::Adam> alone(found, kAdam, nullptr);
  train(alone, found, 0, 3);
  EXPECT_TRUE(all_equal(found, expected));
  EXPECT_NE(alone.gathered(), nullptr);
}

TEST(ShardedOptimizer, StepRunsTheClosureOnceWithAGraph) {
  Tensors parameters = make_parameters({{3}});
  ShardedOptimizer<torch::optim::SGD> sharded(
      parameters, torch::optim::SGDOptions(0.1), nullptr);
  int calls = 0;
  const torch::NoGradGuard no_grad;
  const Tensor before = parameters[0].clone();
  const Tensor loss = sharded.step([&] {
    ++calls;
    Tensor sum = parameters[0].sum();
    sum.backward();
    return sum;
  });
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(loss.equal(before.sum()));
  EXPECT_TRUE(parameters[0].allclose(before - 0.1));
  sharded.zero_grad();
  EXPECT_FALSE(parameters[0].grad().defined());
}

TEST(ShardedOptimizer, RejectsParametersThatCameLater) {
  Tensors parameters = make_parameters({{3}, {2}});
  ShardedOptimizer<torch::optim::SGD> sharded(
      {parameters[0]}, torch::optim::SGDOptions(0.1), nullptr);
  sharded.add_param_group({{parameters[1]}});
  EXPECT_THAT(
      [&] { sharded.step(); },
      ThrowsError<c10::Error>(StartsWith(
          "ShardedOptimizer: expected the 1 distinct parameters that it was "
          "made with, but got 2 in 2 groups.")));
}

TEST(ShardedOptimizer, RejectsToSaveAShare) {
  ShardedOptimizer<torch::optim::SGD> sharded(
      make_parameters({{3}}), torch::optim::SGDOptions(0.1), nullptr);
  std::ostringstream stream;
  EXPECT_THAT(
      [&] { torch::save(sharded, stream); },
      ThrowsError<c10::Error>(StartsWith(
          "ShardedOptimizer::save(): expected an optimiser with the state of "
          "all parameters, but got the share of rank 0.")));
}

} // namespace
