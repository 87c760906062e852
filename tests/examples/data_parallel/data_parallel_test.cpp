// SPDX-License-Identifier: MIT

// Gradients of several ranks against those of one process.

#include "groups.h"
#include "support/modules.h"
#include "support/ranks.h"
#include "support/throws_error.h"
#include "support/tolerances.h"

#include "data_parallel/data_parallel.h"
#include "revnet/revnet.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using memcnn_test::expect_in_ranks;
using memcnn_test::run_ranks;
using memcnn_test::SmoothBranch;
using memcnn_test::ThrowsError;
using parallel::DataParallel;
using parallel::DataParallelOptions;
using parallel::World;
using parallel::WorldOptions;
using testing::HasSubstr;
using torch::Tensor;
using namespace std::chrono_literals;

using Coupling = memcnn::AdditiveCoupling<SmoothBranch, SmoothBranch>;

constexpr int64_t kChannels = 8;

World join(std::chrono::milliseconds timeout = 60s) {
  return World::join(WorldOptions().timeout(timeout));
}

/// A stem, couplings, a block without an inverse, a head: without batch
/// normalisation, so that a batch is the sum of its parts.
struct NetImpl final : torch::nn::Module {
  /// How the blocks run: plain, sequence, wrapper or checkpoint.
  explicit NetImpl(std::string engine_) : engine(std::move(engine_)) {
    stem = register_module("stem", SmoothBranch(3, kChannels));
    for (int i = 0; i < 3; ++i) {
      const Coupling block{
          SmoothBranch(kChannels / 2), SmoothBranch(kChannels / 2)};
      register_module("block" + std::to_string(i), block.ptr());
      blocks.push_back(block);
      sequence->push_back(block);
      wrappers.emplace_back(block);
    }
    side = register_module("side", SmoothBranch(kChannels));
    unused = register_module("unused", SmoothBranch(kChannels));
    head = register_module("head", torch::nn::Linear(kChannels, 5));
    to(torch::kFloat64);
  }

  Tensor forward(Tensor x) {
    x = trunk(stem(x));
    x = engine == "checkpoint" ? memcnn::checkpoint(side, x) : side(x);
    return head(x.mean({2, 3}));
  }

  Tensor trunk(Tensor x) {
    if (engine == "sequence") {
      return sequence(x);
    }
    for (size_t i = 0; i < blocks.size(); ++i) {
      x = engine == "wrapper" ? wrappers[i](x) : blocks[i](x);
    }
    return x;
  }

  std::string engine;
  SmoothBranch stem{nullptr};
  std::vector<Coupling> blocks;
  memcnn::ReversibleSequence sequence;
  std::vector<memcnn::InvertibleModuleWrapper<Coupling>> wrappers;
  SmoothBranch side{nullptr};
  SmoothBranch unused{nullptr}; // without a gradient, in every step
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

const std::vector<std::string> kEngines{
    "plain",
    "sequence",
    "wrapper",
    "checkpoint"};

Net make_net(const std::string& engine, uint64_t seed = 1) {
  torch::manual_seed(seed);
  return Net(engine);
}

struct Batch {
  Tensor images;
  Tensor labels;

  static Batch draw(int64_t size, uint64_t seed) {
    torch::manual_seed(seed);
    return {
        torch::randn({size, 3, 6, 6}, torch::kFloat64),
        torch::randint(5, {size}, torch::kLong)};
  }
  /// One of `count` parts of one size.
  Batch part(int64_t index, int64_t count) const {
    return {images.chunk(count)[index], labels.chunk(count)[index]};
  }
};

Tensor loss_of(const Tensor& logits, const Batch& batch) {
  return torch::cross_entropy_loss(logits, batch.labels);
}

/// The largest difference between gradients; none of one network is as good as
/// zeros of the other.
double difference(const torch::nn::Module& a, const torch::nn::Module& b) {
  const auto gradients_of = [](const torch::nn::Module& module) {
    std::vector<Tensor> gradients;
    for (const Tensor& parameter : module.parameters()) {
      const Tensor& gradient = parameter.grad();
      gradients.push_back(
          (gradient.defined() ? gradient : torch::zeros_like(parameter))
              .flatten());
    }
    return torch::cat(gradients);
  };
  return (gradients_of(a) - gradients_of(b)).abs().max().item<double>();
}

/// Several buckets of these networks' parameters.
DataParallelOptions small_buckets() {
  return DataParallelOptions().bucket_bytes(4096).first_bucket_bytes(1024);
}

// --- Gradients ----------------------------------------------------------------

/// A step on the ranks' parts of a batch, from weights that differ before.
void expect_average(
    const World& world,
    const std::string& engine,
    const DataParallelOptions& options) {
  Net net = make_net(engine, /*seed=*/1 + world.rank);
  DataParallel parallel(*net, world, options);
  Net whole = make_net("plain");
  for (int step = 0; step < 3; ++step) {
    net->zero_grad();
    whole->zero_grad();
    const Batch batch = Batch::draw(2 * world.size, 10 + step);
    const Batch part = batch.part(world.rank, world.size);
    const bool averaged = step < 2;
    const Tensor logits =
        parallel.forward([&] { return net(part.images); }, averaged);
    loss_of(logits, part).backward();
    loss_of(whole(batch.images), batch).backward();
    if (averaged) {
      EXPECT_LT(difference(*net, *whole), memcnn_test::kGradientFloat64);
    } else {
      EXPECT_GT(difference(*net, *whole), 1e-3);
    }
  }
}

class DataParallelRanks : public testing::TestWithParam<int> {};

TEST_P(DataParallelRanks, AverageGradients) {
  expect_in_ranks(GetParam(), [] {
    const World world = join();
    for (const std::string& engine : kEngines) {
      for (const bool views : {false, true}) {
        SCOPED_TRACE(engine + (views ? ", bucket views" : ""));
        expect_average(
            world,
            engine,
            small_buckets()
                .find_unused_parameters(true)
                .gradient_as_bucket_view(views));
      }
      SCOPED_TRACE(engine + ", static graph");
      expect_average(world, engine, small_buckets().static_graph(true));
    }
  });
}

TEST_P(DataParallelRanks, AverageSumsOfSeveralPasses) {
  expect_in_ranks(GetParam(), [] {
    const World world = join();
    constexpr int64_t kPasses = 3;
    for (const std::string& engine : kEngines) {
      SCOPED_TRACE(engine);
      Net net = make_net(engine);
      Net whole = make_net("plain");
      DataParallel parallel(
          *net, world, small_buckets().find_unused_parameters(true));
      for (int step = 0; step < 2; ++step) {
        net->zero_grad();
        whole->zero_grad();
        const Batch batch = Batch::draw(kPasses * world.size, 10 + step);
        for (int64_t pass = 0; pass < kPasses; ++pass) {
          const Batch part =
              batch.part(pass, kPasses).part(world.rank, world.size);
          const Tensor logits = parallel.forward(
              [&] { return net(part.images); }, pass == kPasses - 1);
          (loss_of(logits, part) / kPasses).backward();
        }
        loss_of(whole(batch.images), batch).backward();
        EXPECT_LT(difference(*net, *whole), memcnn_test::kGradientFloat64);
      }
    }
  });
}

TEST(DataParallel, CountsUsesOfAStaticGraphInOnePass) {
  expect_in_ranks(2, [] {
    const World world = join();
    torch::nn::Linear net(1, 1);
    DataParallel parallel(
        *net, world, DataParallelOptions().static_graph(true));
    for (int step = 0; step < 3; ++step) {
      net->zero_grad();
      for (const bool synchronize : {false, true}) {
        const Tensor x = torch::full({1, 1}, 1.0 + world.rank);
        parallel.forward([&] { return net(x); }, synchronize).sum().backward();
      }
      EXPECT_EQ(net->weight.grad().item<double>(), 3) << "in step " << step;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Of, DataParallelRanks, testing::Values(2, 3));

TEST(DataParallel, NormalisesTheRanksPartsOfABatchApart) {
  expect_in_ranks(2, [] {
    const World world = join();
    const auto make = [](revnet::Engine engine) {
      torch::manual_seed(1);
      return revnet::RevNet(revnet::RevNetOptions()
                                .widths({8, 16})
                                .blocks({2, 2})
                                .stem(8)
                                .engine(engine)
                                .checkpoint_transitions(true));
    };
    const Batch batch = Batch::draw(8, /*seed=*/5);
    const Tensor images = batch.images.to(torch::kFloat32);
    for (const auto engine :
         {revnet::Engine::kSequence, revnet::Engine::kWrapper}) {
      for (const bool is_plain : {false, true}) {
        SCOPED_TRACE(c10::str(engine, is_plain ? ", plain" : ""));
        std::optional<memcnn::PlainAutogradGuard> plain;
        if (is_plain) {
          plain.emplace();
        }
        revnet::RevNet net = make(engine);
        revnet::RevNet whole = make(engine);
        DataParallel parallel(*net, world);
        const Batch part = batch.part(world.rank, 2);
        const Tensor logits =
            parallel.forward([&] { return net(images.chunk(2)[world.rank]); });
        loss_of(logits, part).backward();
        for (int64_t i = 0; i < 2; ++i) { // the parts one after the other
          (loss_of(whole(images.chunk(2)[i]), batch.part(i, 2)) / 2).backward();
        }
        EXPECT_EQ(difference(*net, *whole), 0);
      }
    }
  });
}

TEST(DataParallel, LeavesGradientsOfUnusedParametersUndefined) {
  expect_in_ranks(2, [] {
    const World world = join();
    Net net = make_net("sequence");
    DataParallel parallel(
        *net, world, DataParallelOptions().find_unused_parameters(true));
    const Batch batch = Batch::draw(2, /*seed=*/5);
    loss_of(parallel.forward([&] { return net(batch.images); }), batch)
        .backward();
    EXPECT_TRUE(net->head->weight.grad().defined());
    EXPECT_FALSE(net->unused->conv->weight.grad().defined());
  });
}

TEST(DataParallel, SaysWhichParametersWereUnused) {
  expect_in_ranks(2, [] {
    const World world = join();
    Net net = make_net("plain");
    DataParallel parallel(*net, world);
    const Batch batch = Batch::draw(2, /*seed=*/5);
    const auto step = [&] {
      loss_of(parallel.forward([&] { return net(batch.images); }), batch)
          .backward();
    };
    step(); // averages nothing, and nobody is told before the next one
    EXPECT_THAT(
        step,
        ThrowsError<c10::Error>(HasSubstr(
            "Expected to have finished reduction in the prior iteration")));
  });
}

TEST(DataParallel, SharesAParameterOfTwoModules) {
  expect_in_ranks(2, [] {
    const World world = join();
    const auto make = [] {
      torch::manual_seed(1);
      const torch::nn::Linear shared(4, 4);
      return torch::nn::Sequential(shared, torch::nn::Tanh(), shared);
    };
    torch::nn::Sequential net = make();
    torch::nn::Sequential whole = make();
    DataParallel parallel(*net, world);
    torch::manual_seed(2);
    const Tensor x = torch::randn({4, 4});
    parallel.forward([&] { return net->forward(x.chunk(2)[world.rank]); })
        .square()
        .mean()
        .backward();
    whole->forward(x).square().mean().backward();
    EXPECT_LT(difference(*net, *whole), 1e-6);
    // The engine knows it once.
    EXPECT_EQ(parallel.reducer()->get_backward_stats().size(), 2);
  });
}

TEST(DataParallel, IsThePlainModuleInOneProcess) {
  expect_in_ranks(1, [] {
    torch::nn::Linear net(4, 4);
    DataParallel parallel(*net, World::alone());
    const Tensor y = parallel.forward([&] { return net(torch::ones({2, 4})); });
    y.sum().backward();
    EXPECT_TRUE(torch::equal(net->weight.grad(), torch::full({4, 4}, 2.)));
    EXPECT_FALSE(parallel.reducer());
  });
}

// --- What forward() takes and returns -----------------------------------------

TEST(DataParallel, ReturnsWhatForwardReturns) {
  expect_in_ranks(2, [] {
    const World world = join();
    torch::nn::Linear net(2, 2);
    struct Named {
      Tensor y;
    };
    const auto x = torch::ones({1, 2}) * (1 + world.rank); // 1.5 on average
    const auto expect_average_of = [&](const Tensor& y) {
      y.sum().backward();
      EXPECT_TRUE(torch::equal(net->weight.grad(), torch::full({2, 2}, 1.5)));
      net->zero_grad();
    };
    DataParallel any(*net, world);
    expect_average_of(any.forward([&] { return Named{net(x)}; }).y);
    EXPECT_EQ(any.forward([&] { return 3; }), 3);
    DataParallel found(
        *net, world, DataParallelOptions().find_unused_parameters(true));
    expect_average_of(found.forward([&] { return net(x); }));
    expect_average_of(
        found.forward([&] { return std::vector<Tensor>{net(x)}; })[0]);
    expect_average_of(std::get<0>(
        found.forward([&] { return std::make_tuple(net(x), Tensor()); })));
    expect_average_of(
        found.forward([&] { return std::make_pair(net(x), net(x)); }).first);
    EXPECT_THAT(
        [&] { found.forward([&] { return Named{net(x)}; }); },
        ThrowsError<c10::TypeError>(HasSubstr(
            "DataParallel::forward(): expected `run` to return a "
            "Tensor, a vector of them or a tuple of these, but got ")));
  });
}

TEST(DataParallel, GoesOnAfterAnErrorInForward) {
  expect_in_ranks(2, [] {
    const World world = join();
    for (const auto& options :
         {DataParallelOptions(),
          DataParallelOptions().find_unused_parameters(true),
          DataParallelOptions().static_graph(true),
          DataParallelOptions().rebuild_buckets(true)}) {
      torch::nn::Linear net(2, 2);
      DataParallel parallel(*net, world, options);
      for (int step = 0; step < 3; ++step) {
        EXPECT_THROW(
            parallel.forward([]() -> Tensor { throw std::runtime_error(""); }),
            std::runtime_error);
        net->zero_grad();
        const auto x = torch::ones({1, 2}) * (1 + world.rank);
        parallel.forward([&] { return net(x); }).sum().backward();
        EXPECT_TRUE(torch::equal(net->weight.grad(), torch::full({2, 2}, 1.5)));
      }
    }
  });
}

TEST(DataParallel, MayEndBeforeItsModuleAndAfterIt) {
  expect_in_ranks(2, [] {
    std::optional<World> world = join();
    const auto x = torch::ones({1, 2}) * (1 + world->rank);
    torch::nn::Linear net(2, 2);
    auto parallel = std::make_unique<DataParallel>(
        *net, *world, DataParallelOptions().static_graph(true));
    const Tensor y = parallel->forward([&] { return net(x); });
    parallel.reset();
    y.sum().backward(); // nothing waits for its gradients any more
    EXPECT_TRUE(torch::equal(net->weight.grad(), x.expand({2, 2})));
    net->zero_grad();

    parallel = std::make_unique<DataParallel>(*net, *world);
    world.reset();
    const Tensor weight = net->weight;
    const Tensor z = parallel->forward([&] { return net(x); });
    net = nullptr;
    z.sum().backward();
    EXPECT_TRUE(torch::equal(weight.grad(), torch::full({2, 2}, 1.5)));
  });
}

TEST(DataParallel, KeepsItsBucketsUnlessTold) {
  expect_in_ranks(2, [] {
    const World world = join();
    for (const bool rebuild : {false, true}) {
      torch::nn::Linear linear(2, 2);
      DataParallel parallel(
          *linear, world, DataParallelOptions().rebuild_buckets(rebuild));
      // Where it would rebuild them it lists the gradients of each step.
      EXPECT_EQ(parallel.reducer()->should_rebuild_buckets(), rebuild);
      for (int step = 0; step < 2; ++step) {
        parallel.forward([&] {
                  return linear(torch::ones({1, 2}));
                })
            .sum()
            .backward();
      }
      EXPECT_FALSE(parallel.reducer()->should_rebuild_buckets());
    }
  });
}

// --- Buffers --------------------------------------------------------------------

struct WithBuffersImpl final : torch::nn::Module {
  explicit WithBuffersImpl(int64_t value) {
    weight = register_parameter("weight", torch::ones({2}));
    frozen = register_parameter(
        "frozen", torch::full({2}, value), /*requires_grad=*/false);
    count = register_buffer("count", torch::full({}, value, torch::kLong));
    flag = register_buffer("flag", torch::full({2}, value > 0, torch::kBool));
    none = register_buffer("none", Tensor());
    twice = register_buffer("twice", count);
  }
  Tensor forward() {
    return weight * count;
  }
  Tensor weight, frozen, count, flag, none, twice;
};
TORCH_MODULE(WithBuffers);

TEST(DataParallel, GivesAllRanksTheStateOfRankZero) {
  expect_in_ranks(2, [] {
    const World world = join();
    WithBuffers net(world.rank);
    DataParallel parallel(*net, world);
    EXPECT_EQ(net->frozen.sum().item<double>(), 0);
    EXPECT_EQ(net->count.item<int64_t>(), 0);
    EXPECT_FALSE(net->flag.any().item<bool>());
    EXPECT_FALSE(net->none.defined());
    const auto run = [&] {
      return net->forward();
    };
    net->count.fill_(3 + world.rank);
    parallel.forward(run, /*synchronize=*/false); // begins a step
    EXPECT_EQ(net->count.item<int64_t>(), 3);
    net->count.fill_(5 + world.rank);
    {
      const torch::NoGradGuard no_grad; // an evaluation, which is no part of it
      parallel.forward(run);
    }
    parallel.forward(run); // ends it
    EXPECT_EQ(net->count.item<int64_t>(), 5 + world.rank);
    {
      const torch::NoGradGuard no_grad;
      parallel.forward(run);
    }
    EXPECT_EQ(net->count.item<int64_t>(), 5 + world.rank);
    parallel.broadcast_buffers();
    EXPECT_EQ(net->count.item<int64_t>(), 5);
    DataParallel apart(
        *net, world, DataParallelOptions().broadcast_buffers(false));
    net->count.fill_(7 + world.rank);
    apart.forward(run);
    EXPECT_EQ(net->count.item<int64_t>(), 7 + world.rank);
  });
}

// --- What users do wrong --------------------------------------------------------

TEST(DataParallel, RejectsModulesWithoutTrainedParameters) {
  expect_in_ranks(1, [] {
    const torch::nn::Tanh none;
    EXPECT_THAT(
        [&] { DataParallel(*none, World::alone()); },
        ThrowsError<c10::ValueError>(testing::StrEq(
            "DataParallel::DataParallel(): expected a module with parameters "
            "that require a gradient, but it has none. Call it without "
            "DataParallel.")));
  });
}

TEST(DataParallel, RejectsSeveralDevices) {
  expect_in_ranks(1, [] {
    torch::nn::Linear net(2, 2);
    net->register_parameter("other", torch::empty({2}, torch::kMeta));
    EXPECT_THAT(
        [&] { DataParallel(*net, World::alone()); },
        ThrowsError<c10::ValueError>(HasSubstr(
            "expected all trained parameters on one device, but got cpu and "
            "meta. Move the module to World::device().")));
  });
}

TEST(DataParallel, RejectsEmbeddingsWithSparseGradients) {
  expect_in_ranks(1, [] {
    const auto options = torch::nn::EmbeddingOptions(3, 2).sparse(true);
    torch::nn::Sequential net{torch::nn::Linear(2, 2)};
    net->push_back("words", torch::nn::Embedding(options));
    EXPECT_THAT(
        [&] { DataParallel(*net, World::alone()); },
        ThrowsError<c10::ValueError>(testing::StrEq(
            "DataParallel::DataParallel(): expected dense gradients, but got "
            "sparse ones of the embedding \"words\". Make it with "
            "sparse(false).")));
    torch::nn::EmbeddingBagImpl alone(
        torch::nn::EmbeddingBagOptions(3, 2).sparse(true));
    EXPECT_THAT(
        [&] { DataParallel(alone, World::alone()); },
        ThrowsError<c10::ValueError>(HasSubstr("of the embedding \"\".")));
    for (Tensor& parameter : net[1]->parameters()) {
      parameter.requires_grad_(false);
    }
    EXPECT_NO_THROW(DataParallel(*net, World::alone()));
  });
}

TEST(DataParallel, RejectsExpandedTensors) {
  expect_in_ranks(1, [] {
    torch::nn::Linear net(2, 2);
    net->register_buffer("scale", torch::ones({1, 3}).expand({2, 3}));
    EXPECT_THAT(
        [&] { DataParallel(*net, World::alone()); },
        ThrowsError<c10::ValueError>(testing::StrEq(
            "DataParallel::DataParallel(): expected memory of its own for each "
            "element of scale, but got strides [0, 1], as expand() makes them. "
            "Clone it.")));
  });
}

TEST(DataParallel, RejectsParametersThatHaveChanged) {
  expect_in_ranks(2, [] {
    const World world = join();
    torch::nn::Linear net(2, 2);
    DataParallel parallel(*net, world);
    net->bias.requires_grad_(false);
    const auto run = [&] {
      return net(torch::ones({1, 2}));
    };
    EXPECT_THAT(
        [&] { parallel.forward(run); },
        ThrowsError<c10::Error>(testing::StrEq(
            "DataParallel::forward(): expected parameters on cpu that require a "
            "gradient, as at construction, but got one on cpu that requires "
            "none. Make a DataParallel after moving, casting or freezing "
            "parameters.")));
    net->bias.requires_grad_(true);
    net->to(torch::kFloat64);
    net->to(torch::kFloat32); // the types are those of before
    EXPECT_THAT(
        [&] { parallel.forward(run); },
        ThrowsError<c10::Error>(testing::HasSubstr("moved or cast. Make")));
  });
}

TEST(DataParallel, RejectsRanksThatDiffer) {
  expect_in_ranks(3, [] {
    const World world = join();
    const bool odd = world.rank == 1;
    torch::nn::Linear net(2, odd ? 3 : 2);
    EXPECT_THAT(
        [&] { DataParallel(*net, world); },
        ThrowsError<c10::ValueError>(HasSubstr(
            "expected the same module and options on all ranks, but rank 0 has "
            "\"weight [2, 2], strides [2, 1], float, cpu, trained\" and rank 1 "
            "has \"weight [3, 2], strides [2, 1], float, cpu, trained\".")));
    torch::nn::Linear same(2, 2);
    EXPECT_THAT(
        [&] {
          DataParallel(
              *same, world, DataParallelOptions().bucket_bytes(odd ? 1 : 2));
        },
        ThrowsError<c10::ValueError>(HasSubstr(
            "rank 0 has \"bucket_bytes 2\" and rank 1 has \"bucket_bytes 1\"")));
  });
}

/// Not ours: docs/errors.md has the cures of these.
TEST(DataParallel, DoesNotSupportWhatTheEngineDoesNot) {
  expect_in_ranks(2, [] {
    const World world = join();
    torch::nn::Linear net(2, 2);
    torch::optim::SGD optimizer(net->parameters(), 0.1);
    DataParallel views(
        *net, world, DataParallelOptions().gradient_as_bucket_view(true));
    views.forward([&] { return net(torch::ones({1, 2})); }).sum().backward();
    EXPECT_THAT(
        [&] { optimizer.zero_grad(); },
        ThrowsError<c10::Error>(HasSubstr("Can't detach views in-place")));
    net->zero_grad(/*set_to_none=*/false);
    net->zero_grad();

    const Tensor table = torch::ones({3, 2}).requires_grad_();
    torch::nn::ParameterDict holder;
    holder->insert("table", table);
    DataParallel sparse(*holder, world);
    const auto y = sparse.forward([&] {
      const Tensor index = torch::zeros({1}, torch::kLong);
      return torch::embedding(
          table, index, -1, /*scale_grad_by_freq=*/false, /*sparse=*/true);
    });
    EXPECT_THAT(
        [&] { y.sum().backward(); },
        ThrowsError<c10::Error>(
            HasSubstr("Cannot access storage of SparseTensorImpl")));
  });
}

void step(DataParallel& parallel, torch::nn::Linear& net) {
  parallel.forward([&] { return net(torch::ones({1, 2})); }).sum().backward();
}

TEST(DataParallel, DoesNotWaitForeverForABatchThatIsMissing) {
  auto ranks = memcnn_test::start_ranks(0, 2, 2, [] {
    const World world = join(2s);
    torch::nn::Linear net(2, 2);
    DataParallel parallel(*net, world);
    step(parallel, net);
    if (world.rank == 1) {
      std::this_thread::sleep_for(1h);
    }
    step(parallel, net);
  });
  ranks[0].end(120s);
  EXPECT_THAT(ranks[0].output(), HasSubstr("Timed out waiting 2000ms"));
}

TEST(DataParallel, FailsWhereARankDies) {
  const auto ranks = run_ranks(0, 3, 3, [] {
    const World world = join();
    torch::nn::Linear net(2, 2);
    DataParallel parallel(*net, world);
    step(parallel, net);
    if (world.rank == 1) {
      std::raise(SIGKILL);
    }
    step(parallel, net);
  });
  for (const int rank : {0, 2}) {
    EXPECT_FALSE(ranks[rank].was_killed()) << rank;
    EXPECT_THAT(ranks[rank].output(), HasSubstr("threw: ")) << rank;
  }
}

// --- On a GPU -------------------------------------------------------------------

void expect_average_on_gpu(parallel::Backend backend) {
  const World world = World::join(WorldOptions().timeout(60s).backend(backend));
  const torch::Device device = world.device();
  ASSERT_TRUE(device.is_cuda());
  EXPECT_EQ(
      world.sum(torch::ones({2}, device)).sum().item<float>(), 2 * world.size);
  EXPECT_EQ(world.sum(torch::ones({2})).sum().item<float>(), 2 * world.size);
  EXPECT_EQ(world.broadcast_bytes("bytes"), "bytes");
  for (const std::string& engine : kEngines) {
    for (const bool views : {false, true}) {
      SCOPED_TRACE(engine + (views ? ", bucket views" : ""));
      Net net = make_net(engine, /*seed=*/1 + world.rank);
      Net whole = make_net("plain");
      net->to(device);
      whole->to(device);
      DataParallel parallel(
          *net,
          world,
          small_buckets().find_unused_parameters(true).gradient_as_bucket_view(
              views));
      for (int step = 0; step < 3; ++step) {
        net->zero_grad();
        whole->zero_grad();
        Batch batch = Batch::draw(2 * world.size, 10 + step);
        batch = {batch.images.to(device), batch.labels.to(device)};
        const Batch part = batch.part(world.rank, world.size);
        loss_of(parallel.forward([&] { return net(part.images); }), part)
            .backward();
        loss_of(whole(batch.images), batch).backward();
        EXPECT_LT(difference(*net, *whole), memcnn_test::kGradientFloat64);
      }
      net->to(torch::kCPU);
      EXPECT_THAT(
          [&] { parallel.forward([] { return Tensor(); }); },
          ThrowsError<c10::Error>(HasSubstr("but got one on cpu. Make a")));
    }
  }
}

TEST(DataParallelCuda, TwoRanksShareAGpuThroughGloo) {
  if (!memcnn_test::has_gpu()) {
    GTEST_SKIP() << "there is no GPU";
  }
  using parallel::Backend;
  for (const auto backend : {Backend::kGloo, Backend::kAutomatic}) {
    expect_in_ranks(2, [backend] { expect_average_on_gpu(backend); });
  }
}

TEST(DataParallelCuda, OneRankAveragesThroughNccl) {
#if defined(PARALLEL_NCCL)
  if (!memcnn_test::has_gpu()) {
    GTEST_SKIP() << "there is no GPU";
  }
  expect_in_ranks(
      1, [] { expect_average_on_gpu(parallel::Backend::kAutomatic); });
#else
  GTEST_SKIP() << "NCCL is not compiled in";
#endif
}

} // namespace
