// SPDX-License-Identifier: MIT

#include "data_parallel/sync_batch_norm.h"

#include "data_parallel/data_parallel.h"
#include "data_parallel/world.h"
#include "groups.h"

#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using memcnn_test::Chain;
using memcnn_test::Engine;
using memcnn_test::expect_in_group;
using memcnn_test::expect_in_ranks;
using memcnn_test::Group;
using memcnn_test::relative_error;
using memcnn_test::ThrowsError;
using parallel::SyncBatchNorm;
using testing::StartsWith;
using torch::Tensor;
using torch::nn::BatchNormOptions;
using Tensors = std::vector<Tensor>;

constexpr double kTolerance = memcnn_test::kGradientFloat64;

/// The same in every process.
Tensor draw(at::IntArrayRef sizes, int seed) {
  return torch::randn(
      sizes, at::detail::createCPUGenerator(seed), torch::kDouble);
}

/// Splits a batch over ranks unevenly: the first has most, and of three the last
/// one nothing.
Tensor part_of(const Tensor& batch, const Group& group) {
  const int64_t size = batch.size(0);
  const int64_t first = (2 * size + 2) / 3;
  return group->getRank() == 0 ? batch.narrow(0, 0, first)
      : group->getRank() == 1  ? batch.narrow(0, first, size - first)
                               : batch.narrow(0, 0, 0);
}

Tensor sum_over_ranks(const Tensor& tensor, const Group& group) {
  std::vector<Tensor> sum = {tensor.clone(at::MemoryFormat::Contiguous)};
  group->allreduce(sum)->wait();
  return sum[0];
}

Tensor loss_of(const Tensor& y) {
  return (y - 0.3).square().sum() + y.tanh().sum();
}

void copy(const Tensors& from, const Tensors& to) {
  ASSERT_LE(from.size(), to.size());
  const torch::NoGradGuard no_grad;
  for (size_t i = 0; i < from.size(); ++i) {
    to[i].copy_(from[i]);
  }
}

// --- inside blocks that run again -------------------------------------------

constexpr int64_t kChannels = 3; // of a half

/// Normalisation of some kind, tanh, and a convolution.
template <class Norm>
struct BranchImpl final : torch::nn::Cloneable<BranchImpl<Norm>> {
  explicit BranchImpl(Norm norm_) : norm(std::move(norm_)) {
    reset();
  }
  void reset() override {
    this->register_module("norm", norm);
    convolution = this->register_module(
        "convolution",
        torch::nn::Conv2d(
            torch::nn::Conv2dOptions(kChannels, kChannels, 3).padding(1)));
  }
  Tensor forward(Tensor x) {
    return convolution(torch::tanh(norm(x)));
  }

  Norm norm;
  torch::nn::Conv2d convolution{nullptr};
};

template <class Norm>
torch::nn::AnyModule branch(Norm norm) {
  return torch::nn::AnyModule(
      std::make_shared<BranchImpl<Norm>>(std::move(norm)));
}

/// Couplings, and how they run: plainly, by an engine, or checkpointed.
enum class Way { kPlain, kWrapper, kSequence, kKeptResults, kCheckpoint };

struct Trunk {
  template <class MakeNorm>
  explicit Trunk(const MakeNorm& make_norm)
      : chain(Chain::make(3, [&] { return branch(make_norm()); })) {
    chain.module().to(torch::kDouble);
  }

  Tensor run(Way way, Tensor x) {
    switch (way) {
      case Way::kWrapper:
        return chain.run(Engine::kWrapper, x);
      case Way::kSequence:
        return chain.run(Engine::kSequence, x);
      case Way::kKeptResults:
        return chain.run(Engine::kKeptResults, x);
      case Way::kCheckpoint:
        for (size_t i = 0; i < 3; ++i) {
          x = memcnn::checkpoint(chain.block(i), x);
        }
        return x;
      default:
        return chain.plain(x);
    }
  }

  Chain chain;
};

/// The same in every process.
Trunk whole_trunk() {
  torch::manual_seed(1);
  return Trunk([] { return torch::nn::BatchNorm2d(kChannels); });
}

Trunk trunk_of(const Trunk& whole, const Group& group) {
  Trunk trunk([&] { return SyncBatchNorm(kChannels, group); });
  copy(whole.chain.parameters(), trunk.chain.parameters());
  return trunk;
}

/// What a step leaves behind.
struct Step {
  Tensor input_gradient;
  Tensors gradients;
  Tensors buffers;
};

/// Backward from a batch, and copies of what it left.
Step step(Trunk& trunk, Way way, const Tensor& batch) {
  const Tensor input = batch.clone().requires_grad_();
  for (Tensor& parameter : trunk.chain.module().parameters()) {
    parameter.mutable_grad().reset();
  }
  loss_of(trunk.run(way, input * 1)).backward();
  Step left{input.grad(), trunk.chain.gradients(), {}};
  for (const Tensor& buffer : trunk.chain.module().buffers()) {
    left.buffers.push_back(buffer.clone());
  }
  return left;
}

std::string name_of(
    const testing::TestParamInfo<std::tuple<Way, int>>& combination) {
  constexpr const char* kNames[] = {
      "Plain", "Wrapper", "Sequence", "KeptResults", "Checkpoint"};
  const auto [way, ranks] = combination.param;
  return kNames[static_cast<int>(way)] + std::to_string(ranks);
}

class SyncBatchNormIn : public testing::TestWithParam<std::tuple<Way, int>> {};

TEST_P(SyncBatchNormIn, IsBatchNormOfTheWholeBatch) {
  const Way way = std::get<0>(GetParam());
  expect_in_group(std::get<1>(GetParam()), [&](const Group& group) {
    Trunk whole = whole_trunk();
    Trunk trunk = trunk_of(whole, group);
    for (int seed = 0; seed < 3; ++seed) {
      const Tensor batch = draw({6, 2 * kChannels, 4, 4}, seed);
      const Step expected = step(whole, Way::kPlain, batch);
      const Step found = step(trunk, way, part_of(batch, group));
      Tensors summed;
      for (const Tensor& gradient : found.gradients) {
        summed.push_back(sum_over_ranks(gradient, group));
      }
      EXPECT_LT(relative_error(summed, expected.gradients), kTolerance);
      EXPECT_LT(relative_error(found.buffers, expected.buffers), kTolerance);
      EXPECT_LT(
          relative_error(
              found.input_gradient, part_of(expected.input_gradient, group)),
          kTolerance);
    }
  });
}

/// The gradients of the loss and of the square of its input's gradient.
Tensors second_order_gradients(Trunk& trunk, Way way, const Tensor& batch) {
  const Tensor input = batch.clone().requires_grad_();
  const Tensor loss = loss_of(trunk.run(way, input * 1));
  const Tensor gradient = torch::autograd::grad(
      {loss},
      {input},
      /*grad_outputs=*/{},
      /*retain_graph=*/true,
      /*create_graph=*/true)[0];
  const Tensor sum = loss + gradient.square().sum();
  return torch::autograd::grad({sum}, trunk.chain.parameters());
}

TEST_P(SyncBatchNormIn, SecondDerivativesAreThoseOfTheWholeBatch) {
  const Way way = std::get<0>(GetParam());
  expect_in_group(std::get<1>(GetParam()), [&](const Group& group) {
    Trunk whole = whole_trunk();
    Trunk trunk = trunk_of(whole, group);
    const Tensor batch = draw({6, 2 * kChannels, 4, 4}, 1);
    const Tensors expected = second_order_gradients(whole, Way::kPlain, batch);
    Tensors found = second_order_gradients(trunk, way, part_of(batch, group));
    for (Tensor& gradient : found) {
      gradient = sum_over_ranks(gradient, group);
    }
    EXPECT_LT(
        relative_error(found, expected), memcnn_test::kSecondDerivativeFloat64);
  });
}

INSTANTIATE_TEST_SUITE_P(
    Blocks,
    SyncBatchNormIn,
    testing::Combine(
        testing::Values(
            Way::kPlain,
            Way::kWrapper,
            Way::kSequence,
            Way::kKeptResults,
            Way::kCheckpoint),
        testing::Values(2, 3)),
    name_of);

// --- by itself --------------------------------------------------------------

/// Compares one layer with BatchNorm, in two steps on uneven batches.
template <class BatchNorm>
void expect_batch_norm(
    const BatchNormOptions& options,
    at::IntArrayRef sizes,
    at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  expect_in_group(3, [&](const Group& group) {
    BatchNorm whole(options);
    SyncBatchNorm synced(options, group);
    whole->to(torch::kDouble);
    synced->to(torch::kDouble);
    if (whole->weight.defined()) {
      copy({draw({sizes[1]}, 20), draw({sizes[1]}, 21)}, whole->parameters());
      copy(whole->parameters(), synced->parameters());
    }
    for (int seed = 0; seed < 2; ++seed) {
      const Tensor batch = draw(sizes, seed).contiguous(format);
      const Tensor all = batch.clone().requires_grad_();
      const Tensor part = part_of(batch, group).clone().requires_grad_();
      const Tensor y = synced(part);
      loss_of(whole(all)).backward();
      loss_of(y).backward();
      EXPECT_EQ(y.suggest_memory_format(), part.suggest_memory_format());
      EXPECT_LT(
          relative_error(part.grad(), part_of(all.grad(), group)), kTolerance);
      EXPECT_EQ(part.grad().strides(), part.strides());
    }
    for (size_t i = 0; i < whole->parameters().size(); ++i) {
      const auto& gradient = synced->parameters()[i].grad();
      EXPECT_LT(
          relative_error(
              sum_over_ranks(gradient, group), whole->parameters()[i].grad()),
          kTolerance);
    }
    EXPECT_LT(relative_error(synced->buffers(), whole->buffers()), kTolerance);
    synced->eval();
    whole->eval();
    const Tensor batch = draw(sizes, 5);
    EXPECT_LT(relative_error(synced(batch), whole(batch)), kTolerance);
  });
}

TEST(SyncBatchNorm, TakesAnyNumberOfDimensions) {
  const BatchNormOptions options(4);
  expect_batch_norm<torch::nn::BatchNorm1d>(options, {6, 4});
  expect_batch_norm<torch::nn::BatchNorm1d>(options, {6, 4, 5});
  expect_batch_norm<torch::nn::BatchNorm2d>(options, {6, 4, 3, 2});
  expect_batch_norm<torch::nn::BatchNorm3d>(options, {6, 4, 3, 2, 2});
}

TEST(SyncBatchNorm, HasTheOptionsOfBatchNorm) {
  using Norm = torch::nn::BatchNorm2d;
  const std::vector<int64_t> sizes = {6, 4, 3, 2};
  const BatchNormOptions options = BatchNormOptions(4).eps(0.1);
  expect_batch_norm<Norm>(BatchNormOptions(options).affine(false), sizes);
  expect_batch_norm<Norm>(BatchNormOptions(options).momentum(0.7), sizes);
  expect_batch_norm<Norm>(
      BatchNormOptions(options).momentum(std::nullopt), sizes);
  expect_batch_norm<Norm>(
      BatchNormOptions(options).track_running_stats(false), sizes);
}

TEST(SyncBatchNorm, KeepsTheFormatOfItsInput) {
  expect_batch_norm<torch::nn::BatchNorm2d>(
      BatchNormOptions(4), {6, 4, 3, 2}, at::MemoryFormat::ChannelsLast);
}

TEST(SyncBatchNorm, ComputesNarrowInputsInFloat32) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    expect_in_group(2, [&](const Group& group) {
      const Tensor batch = draw({6, 4, 3, 2}, 1).to(dtype);
      const Tensor narrow = part_of(batch, group).clone().requires_grad_();
      const Tensor wide = narrow.detach().to(torch::kFloat).requires_grad_();
      SyncBatchNorm of_narrow(4, group);
      SyncBatchNorm of_wide(4, group);
      const Tensor y = of_narrow(narrow);
      const Tensor expected = of_wide(wide);
      const Tensor gradient = part_of(draw({6, 4, 3, 2}, 2), group).to(dtype);
      y.backward(gradient);
      expected.backward(gradient.to(torch::kFloat));
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_TRUE(y.equal(expected.to(dtype)));
      EXPECT_TRUE(narrow.grad().equal(wide.grad().to(dtype)));
      EXPECT_TRUE(of_narrow->running_var.equal(of_wide->running_var));
      of_narrow->to(dtype);
      EXPECT_EQ(of_narrow(narrow).scalar_type(), dtype);
    });
  }
}

TEST(SyncBatchNorm, KeepsItsDigitsWhereMeansAreLarge) {
  expect_in_group(2, [](const Group& group) {
    const Tensor batch = draw({60, 4}, 1) + 1e4;
    SyncBatchNorm norm(BatchNormOptions(4).affine(false), group);
    const Tensor found = norm(part_of(batch, group).to(torch::kFloat));
    SyncBatchNorm exact(BatchNormOptions(4).affine(false), group);
    const Tensor expected = exact(part_of(batch, group));
    // The input is rounded by 5e-4; squares would be by 8.
    EXPECT_LT(relative_error(found, expected), 1e-3);
  });
}

TEST(SyncBatchNorm, SecondDerivativesAreThoseOfTheWholeBatch) {
  // The loss, and the square of its gradient.
  const auto second = [](const Tensor& input, auto norm) {
    const Tensor y = norm->forward(input).tanh();
    const Tensor gradient = torch::autograd::grad(
        {y.square().sum()},
        {input},
        /*grad_outputs=*/{},
        /*retain_graph=*/true,
        /*create_graph=*/true)[0];
    (y.sum() + gradient.square().sum()).backward();
  };
  expect_in_group(3, [&](const Group& group) {
    torch::nn::BatchNorm2d whole(4);
    whole->to(torch::kDouble);
    copy({draw({4}, 3), draw({4}, 4)}, whole->parameters());
    const Tensor batch = draw({6, 4, 3, 2}, 1);
    const Tensor all = batch.clone().requires_grad_();
    second(all, whole);
    SyncBatchNorm norm(4, group);
    norm->to(torch::kDouble);
    copy(whole->parameters(), norm->parameters());
    const Tensor part = part_of(batch, group).clone().requires_grad_();
    second(part, norm);
    EXPECT_LT(
        relative_error(part.grad(), part_of(all.grad(), group)),
        memcnn_test::kSecondDerivativeFloat64);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_LT(
          relative_error(
              sum_over_ranks(norm->parameters()[i].grad(), group),
              whole->parameters()[i].grad()),
          memcnn_test::kSecondDerivativeFloat64);
    }
  });
}

TEST(SyncBatchNorm, ExchangesNothingInEvalModeOrForAnInputWithoutGradient) {
  expect_in_group(2, [](const Group& group) {
    SyncBatchNorm norm(4, group);
    const Tensor batch = draw({2, 4}, 1).to(torch::kFloat);
    Tensor y = norm(batch);
    if (group->getRank() == 0) { // alone: a collective would wait for rank 1
      y.sum().backward();
      norm->eval();
      norm(batch);
      EXPECT_TRUE(norm->weight.grad().defined());
    }
  });
}

TEST(SyncBatchNorm, SharesItsGroupWithDataParallel) {
  expect_in_ranks(2, [] {
    const auto world = parallel::World::join(
        parallel::WorldOptions().backend(parallel::Backend::kGloo));
    Trunk whole = whole_trunk();
    Trunk trunk = trunk_of(whole, world.group);
    const Tensor batch = draw({6, 2 * kChannels, 4, 4}, 1);
    const Step expected = step(whole, Way::kPlain, batch);
    parallel::DataParallel parallel(
        trunk.chain.module(),
        world,
        parallel::DataParallelOptions()
            .bucket_bytes(2000) // several, between the collectives of the norms
            .first_bucket_bytes(500));
    const Tensor input = part_of(batch, world.group) * 1;
    loss_of(parallel.forward([&] {
      return trunk.run(Way::kSequence, input);
    })).backward();
    Tensors summed;
    for (const Tensor& average : trunk.chain.gradients()) {
      summed.push_back(average * world.size);
    }
    EXPECT_LT(relative_error(summed, expected.gradients), kTolerance);
  });
}

TEST(SyncBatchNorm, LeavesStatisticsThatAreSetAside) {
  SyncBatchNorm norm(4, nullptr);
  const auto mean = std::exchange(norm->running_mean, Tensor());
  const auto count = std::exchange(norm->num_batches_tracked, Tensor());
  norm(draw({6, 4}, 1).to(torch::kFloat));
  EXPECT_TRUE(mean.equal(torch::zeros({4})));
  EXPECT_EQ(count.item<int64_t>(), 0);
}

TEST(SyncBatchNorm, RunsAloneWithoutAGroup) {
  expect_in_ranks(1, [] {
    SyncBatchNorm norm(BatchNormOptions(4), nullptr);
    torch::nn::BatchNorm1d expected(4);
    const Tensor batch = draw({6, 4}, 1).to(torch::kFloat);
    const Tensor input = batch.clone().requires_grad_();
    const Tensor same = batch.clone().requires_grad_();
    loss_of(norm(input)).backward();
    loss_of(expected(same)).backward();
    EXPECT_LT(
        relative_error(input.grad(), same.grad()),
        memcnn_test::kGradientFloat32);
  });
}

TEST(SyncBatchNorm, LoadsAndSavesWhatBatchNormDoes) {
  torch::nn::BatchNorm2d batch_norm(4);
  copy({draw({4}, 1), draw({4}, 2)}, batch_norm->parameters());
  copy({draw({4}, 3), draw({4}, 4)}, batch_norm->buffers(/*recurse=*/false));
  std::stringstream file;
  torch::save(batch_norm, file);
  SyncBatchNorm norm(4, nullptr);
  torch::load(norm, file);
  const auto copied =
      std::dynamic_pointer_cast<parallel::SyncBatchNormImpl>(norm->clone());
  EXPECT_TRUE(
      memcnn_test::all_equal(norm->parameters(), batch_norm->parameters()));
  EXPECT_TRUE(memcnn_test::all_equal(norm->buffers(), batch_norm->buffers()));
  EXPECT_TRUE(memcnn_test::all_equal(copied->buffers(), batch_norm->buffers()));
  EXPECT_NE(copied->weight.data_ptr(), norm->weight.data_ptr());
}

TEST(SyncBatchNorm, PrintsItsOptions) {
  std::ostringstream printed;
  printed << SyncBatchNorm(
      BatchNormOptions(4).momentum(std::nullopt).affine(false), nullptr);
  EXPECT_EQ(
      printed.str(),
      "parallel::SyncBatchNorm(4, eps=1e-05, momentum=None, affine=false, "
      "track_running_stats=true)");
}

TEST(SyncBatchNorm, RejectsAnInputOfOtherDimensions) {
  SyncBatchNorm norm(4, nullptr);
  for (const Tensor& input : {torch::ones({4}), torch::ones({2, 3})}) {
    EXPECT_THAT(
        [&] { norm(input); },
        ThrowsError<c10::ValueError>(StartsWith(c10::str(
            "SyncBatchNorm::forward(): expected (N, C, *) with 4 channels, but "
            "got sizes ",
            input.sizes(),
            "."))));
  }
}

TEST(SyncBatchNorm, RejectsIntegers) {
  SyncBatchNorm norm(4, nullptr);
  EXPECT_THAT(
      [&] {
        norm(torch::ones({2, 4}, torch::kLong));
      },
      ThrowsError<c10::TypeError>(StartsWith(
          "SyncBatchNorm::forward(): expected a floating point input, but got "
          "long")));
}

TEST(SyncBatchNorm, MayHaveNoChannel) {
  SyncBatchNorm norm(0, nullptr);
  EXPECT_EQ(norm(torch::ones({2, 0, 3})).sizes(), at::IntArrayRef({2, 0, 3}));
}

TEST(SyncBatchNorm, RejectsAsOneABatchOfOneValueOnAllRanks) {
  expect_in_group(2, [](const Group& group) {
    SyncBatchNorm norm(4, group);
    const Tensor input = torch::ones({group->getRank(), 4});
    EXPECT_THROW(norm(input), c10::ValueError); // on each
  });
  SyncBatchNorm norm(4, nullptr);
  EXPECT_THAT(
      [&] {
        norm(torch::ones({1, 4}));
      },
      ThrowsError<c10::ValueError>(StartsWith(
          "SyncBatchNorm::forward(): expected two values of a channel or more "
          "on all ranks together, but got 1.")));
}

TEST(SyncBatchNorm, RejectsAsOneOtherNumbersOfChannelsElsewhere) {
  expect_in_group(2, [](const Group& group) {
    const int64_t channels = 3 + group->getRank();
    SyncBatchNorm norm(channels, group);
    try {
      norm(torch::ones({2, channels}));
      FAIL();
    } catch (const c10::ValueError& error) {
      EXPECT_THAT(
          error.what_without_backtrace(),
          StartsWith(
              "SyncBatchNorm::forward(): expected as many channels on every "
              "rank, but got " +
              std::to_string(channels) + " on rank " +
              std::to_string(group->getRank()) + " and others elsewhere."));
    }
  });
}

/// Of as many ranks, on one device.
void expect_batch_norm_on_gpu(int ranks, parallel::Backend backend) {
  if (!memcnn_test::has_gpu()) {
    GTEST_SKIP() << "no CUDA device";
  }
  const auto compare = [](const Group& group) {
    const auto part = [&](const Tensor& tensor) {
      return group->getSize() == 1 ? tensor : part_of(tensor, group);
    };
    torch::nn::BatchNorm2d whole(4);
    SyncBatchNorm norm(4, group);
    whole->to(torch::kCUDA, torch::kDouble);
    norm->to(torch::kCUDA, torch::kDouble);
    const Tensor batch = draw({6, 4, 3, 2}, 1).to(torch::kCUDA);
    const Tensor all = batch.clone().requires_grad_();
    const Tensor input = part(batch).clone().requires_grad_();
    loss_of(whole(all)).backward();
    loss_of(norm(input)).backward();
    EXPECT_LT(relative_error(input.grad(), part(all.grad())), kTolerance);
    EXPECT_LT(relative_error(norm->buffers(), whole->buffers()), kTolerance);
  };
  expect_in_group(ranks, compare, backend);
}

TEST(SyncBatchNormCuda, TwoRanksShareAGpuThroughGloo) {
  expect_batch_norm_on_gpu(2, parallel::Backend::kGloo);
}

TEST(SyncBatchNormCuda, OneRankRunsThroughNccl) {
#if defined(PARALLEL_NCCL)
  expect_batch_norm_on_gpu(1, parallel::Backend::kNccl);
#else
  GTEST_SKIP() << "NCCL is not compiled in";
#endif
}

} // namespace
