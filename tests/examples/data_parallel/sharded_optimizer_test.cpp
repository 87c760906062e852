// SPDX-License-Identifier: MIT

#include "data_parallel/sharded_optimizer.h"

#include "groups.h"
#include "support/throws_error.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

namespace {

using memcnn_test::all_equal;
using memcnn_test::expect_in_group;
using memcnn_test::Group;
using memcnn_test::ThrowsError;
using parallel::ShardedOptimizer;
using testing::StartsWith;
using torch::Tensor;
using torch::optim::OptimizerParamGroup;
using Tensors = std::vector<Tensor>;

/// The same ones in every process.
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

Tensors make_parameters(
    const std::vector<std::vector<int64_t>>& sizes,
    torch::Device device = torch::kCPU) {
  Tensors parameters = draw(sizes, /*seed=*/1);
  for (Tensor& parameter : parameters) {
    parameter = parameter.to(device).requires_grad_();
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
    parameters[i].mutable_grad() = gradients[i].to(parameters[i].device());
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
  expect_in_group(ranks, [&](const Group& group) {
    Tensors expected = make_parameters(kSizes);
    Inner whole(groups_of(expected, options), options);
    train(whole, expected, 0, 5);
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
  expect_in_group(GetParam(), [&](const Group& group) {
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
  expect_in_group(GetParam(), [&](const Group& group) {
    Tensors expected = make_parameters(sizes);
    torch::optim::Adam whole(expected, options);
    train(whole, expected, 0, 3);
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

/// Files of weights and of an optimiser.
class Files {
 public:
  Files()
      : stem_(
            testing::TempDir() + "memcnn_sharded_optimizer_" +
            std::to_string(::getpid())) {}
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;
  ~Files() {
    std::remove(weights().c_str());
    std::remove(optimizer().c_str());
  }

  void save(const Tensors& parameters, const torch::optim::Optimizer& state) {
    torch::save(parameters, weights());
    torch::save(state, optimizer());
  }

  void load(Tensors& parameters, torch::optim::Optimizer& state) const {
    Tensors loaded;
    torch::load(loaded, weights());
    const torch::NoGradGuard no_grad;
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters[i].copy_(loaded[i]);
    }
    torch::load(state, optimizer());
  }

 private:
  std::string weights() const {
    return stem_ + "_weights.pt";
  }
  std::string optimizer() const {
    return stem_ + "_optimizer.pt";
  }

  std::string stem_;
};

const torch::optim::AdamOptions kAdam = torch::optim::AdamOptions(0.01);

/// Trains for three steps on some ranks, and writes what rank 0 then has.
void save_after_three_steps(
    const Group& group,
    Files& files,
    torch::Device device = torch::kCPU) {
  Tensors weights = make_parameters(kSizes, device);
  ShardedOptimizer<torch::optim::Adam> sharded(
      groups_of(weights, kAdam), kAdam, group);
  train(sharded, weights, 0, 3);
  if (const auto whole = sharded.gathered()) {
    files.save(weights, *whole);
  }
  train(sharded, weights, 3, 4); // gathering leaves the others as they were
}

/// Of an unsharded run, stopped and resumed at the same places.
Tensors weights_after_six_steps(torch::Device device = torch::kCPU) {
  Tensors weights = make_parameters(kSizes, device);
  torch::optim::Adam one(groups_of(weights, kAdam), kAdam);
  train(one, weights, 0, 3);
  train(one, weights, 3, 6);
  return weights;
}

/// Goes on from the files.
template <class Optimizer>
void expect_the_same_end(
    const Files& files,
    Optimizer& optimizer,
    Tensors& weights) {
  train(optimizer, weights, 10, 11); // state that loading replaces
  files.load(weights, optimizer);
  EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 0.01 / 4);
  EXPECT_EQ(optimizer.param_groups()[1].options().get_lr(), 0.003 / 4);
  train(optimizer, weights, 3, 6);
  EXPECT_TRUE(all_equal(weights, weights_after_six_steps(weights[0].device())));
}

TEST(ShardedOptimizer, FileIsThatOfOneRank) {
  Files files;
  expect_in_group(
      2, [&](const Group& group) { save_after_three_steps(group, files); });
  Tensors weights = make_parameters(kSizes);
  torch::optim::Adam one(groups_of(weights, kAdam), kAdam);
  expect_the_same_end(files, one, weights);
}

TEST(ShardedOptimizer, GoesOnWithAnotherNumberOfRanks) {
  Files files;
  expect_in_group(
      3, [&](const Group& group) { save_after_three_steps(group, files); });
  for (const int ranks : {1, 2, 3}) {
    expect_in_group(ranks, [&](const Group& group) {
      Tensors weights = make_parameters(kSizes);
      ShardedOptimizer<torch::optim::Adam> sharded(
          groups_of(weights, kAdam), kAdam, group);
      expect_the_same_end(files, sharded, weights);
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
  memcnn_test::expect_in_ranks(1, [] {
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
  });
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

TEST(ShardedOptimizer, RejectsToGatherOnNoRank) {
  ShardedOptimizer<torch::optim::SGD> sharded(
      make_parameters({{3}}), torch::optim::SGDOptions(0.1), nullptr);
  for (const int root : {-1, 1}) {
    EXPECT_THAT(
        [&] { sharded.gathered(root); },
        ThrowsError<c10::ValueError>(StartsWith(
            "ShardedOptimizer::gathered(): expected a rank from 0 to 0 for "
            "root, but got ")));
  }
}

/// On as many ranks, which share a GPU.
void expect_the_same_end_on_gpu(int ranks, parallel::Backend backend) {
  if (!memcnn_test::has_gpu()) {
    GTEST_SKIP() << "no CUDA device";
  }
  Files files;
  const auto stop = [&](const Group& group) {
    save_after_three_steps(group, files, torch::kCUDA);
  };
  const auto go_on = [&](const Group& group) {
    Tensors weights = make_parameters(kSizes, torch::kCUDA);
    ShardedOptimizer<torch::optim::Adam> sharded(
        groups_of(weights, kAdam), kAdam, group);
    expect_the_same_end(files, sharded, weights);
  };
  expect_in_group(ranks, stop, backend);
  expect_in_group(ranks, go_on, backend);
}

TEST(ShardedOptimizerCuda, TwoRanksShareAGpuThroughGloo) {
  expect_the_same_end_on_gpu(2, parallel::Backend::kGloo);
}

TEST(ShardedOptimizerCuda, OneRankRunsThroughNccl) {
#if defined(PARALLEL_NCCL)
  expect_the_same_end_on_gpu(1, parallel::Backend::kNccl);
#else
  GTEST_SKIP() << "NCCL is not compiled in";
#endif
}

} // namespace
