// SPDX-License-Identifier: MIT

// How processes meet and what they tell each other.

#include "support/ranks.h"
#include "support/throws_error.h"

#include "data_parallel/world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using memcnn_test::Child;
using memcnn_test::expect_in_ranks;
using memcnn_test::run_ranks;
using memcnn_test::ThrowsError;
using parallel::World;
using parallel::WorldOptions;
using testing::ElementsAre;
using testing::HasSubstr;
using torch::Tensor;
using namespace std::chrono_literals;

World join(std::chrono::milliseconds timeout = 60s) {
  return World::join(WorldOptions().timeout(timeout));
}

// --- How processes meet -------------------------------------------------------

/// What one process says that joins with this variable besides the usual ones.
std::string error_with(const std::string& name, const std::string& value) {
  const auto ranks = run_ranks(0, 1, 1, [&] {
    ::setenv(name.c_str(), value.c_str(), /*overwrite=*/1);
    join();
  });
  return ranks[0].output();
}

TEST(Rendezvous, RejectsMissingVariable) {
  EXPECT_THAT(
      [] { join(); },
      ThrowsError<c10::ValueError>(testing::StrEq(
          "World::join(): expected the environment variable WORLD_SIZE, but it "
          "is not set. Start the program with torchrun --no-python.")));
  for (const char* name : {"RANK", "LOCAL_RANK", "MASTER_ADDR"}) {
    const auto ranks = run_ranks(0, 1, 1, [&] {
      ::unsetenv(name);
      join();
    });
    EXPECT_THAT(
        ranks[0].output(),
        HasSubstr(
            "expected the environment variable " + std::string(name) +
            ", but it is not set."));
  }
}

TEST(Rendezvous, RejectsWhatIsNoRank) {
  for (const std::string rank : {"one", "", "-1", "1", "0x0", "0 ", "1e9"}) {
    EXPECT_THAT(
        error_with("RANK", rank),
        HasSubstr(
            "expected the environment variable RANK to be an integer from 0 to "
            "0, but got \"" +
            rank +
            "\". Start the program with torchrun --no-python, which sets it."));
  }
}

TEST(Rendezvous, RejectsWrongNumbers) {
  EXPECT_THAT(
      error_with("WORLD_SIZE", "0"),
      HasSubstr("expected the environment variable WORLD_SIZE to be an integer "
                "from 1 to 1048576, but got \"0\"."));
  EXPECT_THAT(
      error_with("MASTER_PORT", "65536"),
      HasSubstr(
          "expected the environment variable MASTER_PORT to be an integer "
          "from 1 to 65535, but got \"65536\"."));
  EXPECT_THAT(
      [] { join(0ms); },
      ThrowsError<c10::ValueError>(testing::StrEq(
          "World::join(): expected a positive timeout, but got 0 ms.")));
}

/// A store that serves several attempts, as torchrun's agent does.
class Agent {
 public:
  Agent()
      : environment_(
            {{"MASTER_PORT", std::to_string(memcnn_test::free_port())},
             {"TORCHELASTIC_USE_AGENT_STORE", "True"}}),
        server_(environment_, serve) {}

  const std::map<std::string, std::string>& environment() const {
    return environment_;
  }

 private:
  static void serve() {
    c10d::TCPStoreOptions options;
    options.port = std::stoi(std::getenv("MASTER_PORT"));
    options.isServer = true;
    options.waitWorkers = false;
    const c10d::TCPStore store("127.0.0.1", options);
    std::this_thread::sleep_for(1h);
  }

  std::map<std::string, std::string> environment_;
  Child server_;
};

TEST(Rendezvous, SaysOnEveryRankWhichOneIsMissing) {
  const Agent agent;
  const auto ranks = run_ranks(
      0, 3, 4, [] { join(2s); }, agent.environment());
  for (const Child& rank : ranks) {
    EXPECT_THAT(
        rank.output(),
        HasSubstr("World::join(): expected 4 ranks to join within 2000 ms, but "
                  "rank 3 did not. See why it did not start, or set "
                  "WorldOptions::timeout()."));
  }
}

TEST(Rendezvous, SaysSoOnEveryRankWhereRankZeroHasTheStore) {
  const auto ranks = run_ranks(0, 3, 4, [] { join(2s); });
  for (const Child& rank : ranks) {
    EXPECT_THAT(rank.output(), HasSubstr("but rank 3 did not. See why"));
  }
}

TEST(Rendezvous, RejectsASecondProcessOfARank) {
  const Agent agent;
  const auto wait = [] {
    join(4s);
  };
  const auto start = [&](int rank) {
    auto started =
        memcnn_test::start_ranks(rank, rank + 1, 3, wait, agent.environment());
    return std::move(started[0]);
  };
  std::vector<Child> twins; // which come before rank 0 as well as after it
  twins.push_back(start(1));
  twins.push_back(start(1));
  Child first = start(0);
  first.end(60s);
  std::string outputs;
  for (Child& twin : twins) {
    twin.end(60s);
    outputs += twin.output();
  }
  EXPECT_THAT(
      outputs,
      HasSubstr(
          "World::join(): expected each rank once, but got two processes "
          "of RANK 1. Give each its own, from 0 to 2, as torchrun does."));
  EXPECT_THAT(first.output(), HasSubstr("but rank 2 did not."));
}

/// The error of a store that is not there, which has one line.
auto says_no_store(const std::string& host, const std::string& reason) {
  return testing::AllOf(
      HasSubstr(
          "World::join(): expected a store at MASTER_ADDR \"" + host +
          "\" and MASTER_PORT "),
      HasSubstr(reason),
      HasSubstr(
          "). Rank 0 or torchrun's agent opens it: see that it runs, that "
          "the name leads to its machine, and that no other has the port."));
}

TEST(Rendezvous, SaysThatAPortIsTaken) {
  const Agent agent;
  const std::map<std::string, std::string> environment{
      {"MASTER_PORT", agent.environment().at("MASTER_PORT")}};
  std::this_thread::sleep_for(1s); // till the agent listens
  const auto ranks = run_ranks(
      0, 1, 1, [] { join(2s); }, environment);
  EXPECT_THAT(ranks[0].output(), says_no_store("127.0.0.1", "EADDRINUSE"));
}

TEST(Rendezvous, SaysThatAHostIsUnknown) {
  for (const std::string host : {"", "no-such-host.invalid"}) {
    const auto ranks =
        run_ranks(0, 1, 1, [] { join(1s); }, {{"MASTER_ADDR", host}});
    EXPECT_THAT(ranks[0].output(), says_no_store(host, "but got ("));
  }
}

TEST(Rendezvous, SaysThatRankZeroIsMissing) {
  const Agent agent;
  const auto ranks = run_ranks(
      1, 2, 2, [] { join(1s); }, agent.environment());
  EXPECT_THAT(
      ranks[0].output(), HasSubstr("within 1000 ms, but rank 0 did not."));
}

TEST(Rendezvous, DoesNotWaitForeverForAStore) {
  const auto ranks = run_ranks(1, 2, 2, [] { join(1s); });
  EXPECT_FALSE(ranks[0].was_killed());
  EXPECT_THAT(ranks[0].output(), says_no_store("127.0.0.1", "timed out"));
}

TEST(Rendezvous, ReadsNothingThatADeadAttemptWrote) {
  const Agent agent;
  const auto die_in_world = [] {
    join();
    std::raise(SIGKILL);
  };
  const auto wait = [] {
    join();
  };
  for (int attempt = 0; attempt < 2; ++attempt) {
    run_ranks(0, 2, 2, die_in_world, agent.environment());
    run_ranks(0, 1, 2, wait, agent.environment(), /*limit=*/500ms);
    run_ranks(1, 2, 2, wait, agent.environment(), /*limit=*/500ms);
    expect_in_ranks(
        2,
        [] {
          if (std::getenv("RANK") == std::string("1")) {
            std::this_thread::sleep_for(200ms); // time for rank 0 to read it
          }
          EXPECT_EQ(join().sum(torch::ones({1})).item<float>(), 2);
        },
        agent.environment());
  }
}

// --- What they tell each other ------------------------------------------------

TEST(World, SumsTensorsOfAnyLayout) {
  expect_in_ranks(3, [] {
    const World world = join();
    const Tensor matrix = torch::arange(6).view({2, 3}).t() + world.rank;
    const Tensor before = matrix.clone();
    const Tensor sum = world.sum(matrix);
    EXPECT_TRUE(torch::equal(sum, torch::arange(6).view({2, 3}).t() * 3 + 3));
    EXPECT_TRUE(torch::equal(matrix, before));
    const Tensor scalar = torch::ones({}, torch::kFloat64).requires_grad_();
    EXPECT_EQ(world.sum(scalar).item<double>(), 3);
    EXPECT_FALSE(world.sum(scalar).requires_grad());
    EXPECT_EQ(world.sum(torch::ones({0, 3})).numel(), 0);
    world.barrier();
  });
}

TEST(World, BroadcastsTensorsInPlace) {
  expect_in_ranks(2, [] {
    const World world = join();
    torch::manual_seed(world.rank);
    const auto random = [] {
      return torch::randn({2, 3, 4, 5});
    };
    const std::vector<Tensor> tensors{
        random().requires_grad_(),
        random().contiguous(torch::MemoryFormat::ChannelsLast),
        random() > 0,
        random().to(torch::kLong),
        random().to(torch::kBFloat16)};
    world.broadcast(tensors);
    torch::manual_seed(0); // what rank 0 has drawn
    EXPECT_TRUE(torch::equal(tensors[0], random()));
    EXPECT_TRUE(torch::equal(tensors[1], random()));
    EXPECT_TRUE(torch::equal(tensors[2], random() > 0));
    EXPECT_TRUE(torch::equal(tensors[3], random().to(torch::kLong)));
    EXPECT_TRUE(torch::equal(tensors[4], random().to(torch::kBFloat16)));
    world.broadcast({});
  });
}

TEST(World, BroadcastsAndGathersBytes) {
  expect_in_ranks(3, [] {
    const World world = join();
    const std::string mine(world.rank, static_cast<char>('a' + world.rank));
    EXPECT_THAT(world.gather_bytes(mine), ElementsAre("", "b", "cc"));
    EXPECT_THAT(world.gather_bytes(""), ElementsAre("", "", ""));
    EXPECT_EQ(world.broadcast_bytes(mine), "");
    const std::string zeros("\0\1\0", 3);
    EXPECT_EQ(world.broadcast_bytes(world.rank == 0 ? zeros : "more"), zeros);
    const std::string many(5'000'000, '\xff');
    EXPECT_EQ(world.broadcast_bytes(world.rank == 0 ? many : ""), many);
  });
}

TEST(World, NamesTheFirstRankThatDiffers) {
  expect_in_ranks(3, [] {
    const World world = join();
    world.require_same("options", "batch 64\nlr 0.1\n");
    const std::string last = world.rank == 2 ? "lr 0.2\n" : "lr 0.1\n";
    EXPECT_THAT(
        [&] { world.require_same("options", "batch 64\n" + last); },
        ThrowsError<c10::ValueError>(testing::StrEq(
            "World::require_same(): expected the same options on all ranks, but "
            "rank 0 has \"lr 0.1\" and rank 2 has \"lr 0.2\". Start all of them "
            "with the same program, arguments and files.")));
    EXPECT_THAT(
        [&] { world.require_same("data", world.rank == 1 ? "a\nb" : "a"); },
        ThrowsError<c10::ValueError>(
            HasSubstr("rank 0 has \"\" and rank 1 has \"b\"")));
    EXPECT_THAT(
        [&] {
          world.require_same("data", world.rank == 1 ? "b\na\n" : "b\na");
        },
        ThrowsError<c10::ValueError>(
            HasSubstr("rank 0 has \"a\" and rank 1 has \"a\\n\".")));
    world.require_same("options", ""); // all are still together
  });
}

TEST(World, IsAloneWithoutOthers) {
  expect_in_ranks(1, [] {
    for (const char* name : {"RANK", "WORLD_SIZE"}) {
      ::unsetenv(name);
    }
    const World world = World::join_or_alone();
    EXPECT_EQ(world.rank, 0);
    EXPECT_EQ(world.size, 1);
    EXPECT_FALSE(world.group);
    EXPECT_EQ(world.sum(torch::ones({2})).sum().item<float>(), 2);
    EXPECT_EQ(world.broadcast_bytes("bytes"), "bytes");
    EXPECT_THAT(world.gather_bytes("bytes"), ElementsAre("bytes"));
    world.broadcast({torch::ones({2})});
    world.require_same("text", "text");
    world.barrier();
  });
}

TEST(World, JoinsWhereAVariableIsSet) {
  const auto ranks = run_ranks(0, 1, 1, [] {
    ::unsetenv("RANK");
    World::join_or_alone();
  });
  EXPECT_THAT(ranks[0].output(), HasSubstr("RANK, but it is not set."));
  expect_in_ranks(2, [] { EXPECT_EQ(World::join_or_alone().size, 2); });
}

TEST(World, KnowsWhetherEachProcessHasAGpu) {
  expect_in_ranks(3, [] {
    World world = join();
    EXPECT_FALSE(world.each_has_gpu(0));
    EXPECT_FALSE(world.each_has_gpu(2)); // says rank 0, too
    EXPECT_TRUE(world.each_has_gpu(3));
    world.local_rank = world.rank % 2; // on two machines
    EXPECT_TRUE(world.each_has_gpu(2));
    EXPECT_FALSE(world.each_has_gpu(world.rank == 2 ? 0 : 2));
  });
}

TEST(World, TakesNoNcclForGranted) {
  expect_in_ranks(1, [] {
    const auto options = WorldOptions().backend(parallel::Backend::kNccl);
#if defined(PARALLEL_NCCL)
    if (torch::cuda::is_available()) {
      EXPECT_TRUE(World::join(options).device().is_cuda());
      return;
    }
    const char* expected =
        "World::join(): expected a GPU for each process, but got LOCAL_RANK 0 "
        "and 0 GPUs. Start fewer processes, or share GPUs with Backend::kGloo.";
#else
    const char* expected =
        "World::join(): expected a program with NCCL compiled in for "
        "Backend::kNccl, but it has gloo alone. Define PARALLEL_NCCL.";
#endif
    EXPECT_THAT(
        [&] { World::join(options); },
        ThrowsError<c10::ValueError>(testing::StrEq(expected)));
  });
}

#if defined(PARALLEL_NCCL)
TEST(World, IsCompiledWithTheHeaderOfLibTorchsNccl) {
  EXPECT_NO_THROW(parallel::detail::check_nccl_header());
}
#endif

TEST(World, FailsWhereARankDies) {
  const auto start = std::chrono::steady_clock::now();
  const auto ranks = run_ranks(0, 2, 2, [] {
    const World world = join();
    world.barrier();
    if (world.rank == 1) {
      std::raise(SIGKILL);
    }
    world.barrier();
  });
  EXPECT_THAT(ranks[0].output(), HasSubstr("threw: "));
  EXPECT_LT(std::chrono::steady_clock::now() - start, 60s); // the timeout
}

// --- By torchrun, which program_test.cpp starts -------------------------------

/// Rank 1 dies in the first attempt after it has met the other one, and in the
/// second before.
int run_as_rank() {
  const std::string attempt = std::getenv("TORCHELASTIC_RESTART_COUNT");
  const bool dies = std::string(std::getenv("RANK")) == "1";
  if (attempt == "1" && dies) {
    std::raise(SIGKILL);
  }
  const World world = join();
  if (attempt == "0" && dies) {
    std::raise(SIGKILL);
  }
  const auto sum = world.sum(torch::ones({1})).item<float>();
  std::cout << "attempt " + attempt + " sum " + c10::str(sum) + "\n";
  return EXIT_SUCCESS;
}

} // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "rank") {
    return run_as_rank();
  }
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
