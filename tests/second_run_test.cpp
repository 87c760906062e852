// SPDX-License-Identifier: MIT
//
// What can change between the two runs of a branch: what the second run sees,
// and what it leaves, on every path that runs a branch again.

#include "support/probes.h"
#include "support/throws_error.h"
#include "support/tolerances.h"
#include "support/twins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <ATen/CPUGeneratorImpl.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <functional>
#include <ostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace memcnn_test {
namespace {

using testing::HasSubstr;

namespace nn = torch::nn;

enum class Path {
  kWrapper,
  kKeepInput,
  kResults, // a wrapper that keeps them
  kSequence,
  kBudget,
  kCheckpoint,
  kCheckpointResults
};

constexpr Path kPaths[] = {
    Path::kWrapper,
    Path::kKeepInput,
    Path::kResults,
    Path::kSequence,
    Path::kBudget,
    Path::kCheckpoint,
    Path::kCheckpointResults};

std::string name_of(Path path) {
  switch (path) {
    case Path::kWrapper:
      return "Wrapper";
    case Path::kKeepInput:
      return "KeepInput";
    case Path::kResults:
      return "Results";
    case Path::kSequence:
      return "Sequence";
    case Path::kBudget:
      return "Budget";
    case Path::kCheckpoint:
      return "Checkpoint";
    default:
      return "CheckpointResults";
  }
}

void PrintTo(Path path, std::ostream* stream) {
  *stream << name_of(path);
}

bool is_checkpoint(Path path) {
  return path == Path::kCheckpoint || path == Path::kCheckpointResults;
}

/// A coupling run along a path.
template <class C>
torch::Tensor run(Path path, C coupling, torch::Tensor x, bool debug = false) {
  constexpr int64_t kBudget = 1 << 30;
  if (path == Path::kWrapper || path == Path::kKeepInput ||
      path == Path::kResults) {
    memcnn::InvertibleModuleWrapper block(
        coupling,
        memcnn::InvertibleModuleWrapperOptions()
            .keep_input(path == Path::kKeepInput)
            .memory_budget(path == Path::kResults ? kBudget : 0)
            .debug(debug));
    return block(x);
  }
  if (is_checkpoint(path)) {
    return memcnn::checkpoint(
        memcnn::CheckpointOptions()
            .memory_budget(path == Path::kCheckpointResults ? kBudget : 0)
            .debug(debug),
        coupling,
        x);
  }
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions()
          .memory_budget(path == Path::kBudget ? kBudget : 0)
          .debug(debug),
      coupling);
  return sequence(x);
}

nn::Functional zero() {
  return nn::Functional([](const torch::Tensor& x) { return x * 0; });
}

class SecondRun : public testing::TestWithParam<Path> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
  }

  /// F's gradient and state after a step equal those of plain autograd.
  template <class Holder>
  void expect_as_plain(
      const std::function<Holder()>& make,
      torch::Tensor x,
      double tolerance = 1e-5) {
    torch::manual_seed(3);
    Holder f = make();
    const torch::Tensor expected = gradient(f, x, /*plain=*/true);
    torch::manual_seed(3);
    Holder again = make();
    const torch::Tensor found = gradient(again, x, /*plain=*/false);
    EXPECT_LT(relative_error(found, expected), tolerance);
    EXPECT_TRUE(all_equal(again->buffers(), f->buffers()));
    EXPECT_TRUE(all_equal(again->parameters(), f->parameters()));
  }

 private:
  template <class Holder>
  torch::Tensor gradient(Holder f, const torch::Tensor& x, bool plain) {
    memcnn::AdditiveCoupling coupling(f, zero());
    const torch::Tensor input = x.detach().requires_grad_();
    torch::Tensor through = input * 1.0;
    torch::Tensor y =
        plain ? coupling(through) : run(GetParam(), coupling, through);
    y.square().sum().backward();
    return input.grad();
  }
};

INSTANTIATE_TEST_SUITE_P(
    Paths,
    SecondRun,
    testing::ValuesIn(kPaths),
    [](const auto& path) { return name_of(path.param); });

// Parameters and buffers that a branch writes.

/// Scales by codes that every run in train mode moves towards its data.
struct CodesImpl final : nn::Module {
  explicit CodesImpl(bool trained = false) {
    codes = register_parameter("codes", torch::ones({1, 3}), trained);
  }
  torch::Tensor forward(torch::Tensor x) {
    torch::Tensor y = x * codes.clone();
    torch::NoGradGuard no_grad;
    if (is_training()) {
      codes.mul_(0.5).add_(x.detach().mean(0, /*keepdim=*/true), 0.5);
    }
    return y;
  }
  torch::Tensor codes;
};
TORCH_MODULE(Codes);

TEST_P(SecondRun, FrozenParameterThatTheBranchMoves) {
  expect_as_plain<Codes>([] { return Codes(); }, torch::randn({4, 6}));
}

TEST_P(SecondRun, TrainedParameterThatTheBranchMoves) {
  // Backward finds the moved values, as it does in plain autograd, which saved
  // a copy of the old ones here.
  expect_as_plain<Codes>([] { return Codes(true); }, torch::randn({4, 6}));
}

/// Takes its first scale from its first batch.
struct ActNormImpl final : nn::Module {
  ActNormImpl() {
    scale = register_parameter("scale", torch::ones({1, 3}));
    ready = register_buffer("ready", torch::zeros({}, torch::kBool));
  }
  torch::Tensor forward(torch::Tensor x) {
    if (is_training() && !ready.item<bool>()) {
      torch::NoGradGuard no_grad;
      scale.copy_(1 / x.std(0, /*unbiased=*/true, /*keepdim=*/true));
      ready.fill_(true);
    }
    return x * scale;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return y / scale;
  }
  torch::Tensor scale;
  torch::Tensor ready;
};
TORCH_MODULE(ActNorm);

TEST_P(SecondRun, LayerThatInitialisesItselfFromItsFirstBatch) {
  expect_as_plain<ActNorm>([] { return ActNorm(); }, torch::randn({9, 6}));
}

TEST_P(SecondRun, VersionsAreThoseThatForwardLeft) {
  ActNorm f;
  memcnn::AdditiveCoupling coupling(f, zero());
  const torch::Tensor x = torch::randn({9, 6}).requires_grad_();
  torch::Tensor loss = run(GetParam(), coupling, x * 1.0).square().sum();
  const auto version = f->scale._version();
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_EQ(f->scale._version(), version);
  EXPECT_NO_THROW(loss.backward());
}

/// A sparse-like layer of LibTorch that writes its trained weight in forward.
struct RenormedImpl final : nn::Module {
  RenormedImpl() {
    table = register_module(
        "table", nn::Embedding(nn::EmbeddingOptions(5, 3).max_norm(0.5)));
  }
  torch::Tensor forward(torch::Tensor x) {
    return x * table(torch::arange(4));
  }
  nn::Embedding table{nullptr};
};
TORCH_MODULE(Renormed);

TEST_P(SecondRun, EmbeddingThatBoundsItsNorms) {
  expect_as_plain<Renormed>([] { return Renormed(); }, torch::randn({4, 6}));
}

TEST_P(SecondRun, BufferOfAnExpandIsNeitherCopiedNorWritten) {
  struct Counter : c10::WarningHandler {
    void process(const c10::Warning&) override {
      ++count;
    }
    int count = 0;
  } counter;
  nn::Functional nothing([](const torch::Tensor& x) { return x * 1; });
  const torch::Tensor eye = torch::eye(2).expand({3, 2, 2});
  nothing->register_buffer("eye", eye);
  memcnn::AdditiveCoupling coupling(nothing, zero());
  const c10::WarningUtils::WarningHandlerGuard guard(&counter);
  for (int step = 0; step < 2; ++step) {
    run(GetParam(), coupling, leaf({5, 4}) * 1.0).sum().backward();
  }
  EXPECT_EQ(counter.count, 0);
}

TEST_P(SecondRun, LargeConstantBufferIsNotCopied) {
  nn::Functional masked([](const torch::Tensor& x) { return x * 2; });
  constexpr int64_t kBytes = int64_t{1} << 24;
  masked->register_buffer("mask", torch::zeros({kBytes}, torch::kByte));
  memcnn::AdditiveCoupling coupling(masked, zero());
  const torch::Tensor x = leaf({5, 4});
  const memcnn::AllocationMeter meter;
  run(GetParam(), coupling, x * 1.0).sum().backward();
  EXPECT_LT(meter.peak_bytes(), kBytes / 2);
}

using Write = std::function<void(torch::Tensor)>;

/// Scales by a buffer, then writes to it in some way.
struct WritingImpl final : nn::Module {
  explicit WritingImpl(Write write_) : write(std::move(write_)) {
    level = register_buffer("level", torch::ones({3}));
  }
  torch::Tensor forward(torch::Tensor x) {
    torch::Tensor y = x * level.clone();
    torch::NoGradGuard no_grad;
    write(level);
    return y;
  }
  Write write;
  torch::Tensor level;
};
TORCH_MODULE(Writing);

TEST_P(SecondRun, WritesOfEveryFormAreSeen) {
  const std::vector<std::pair<const char*, Write>> writes{
      {"in place",
       [](torch::Tensor b) {
         b.add_(1);
       }},
      {"a view",
       [](torch::Tensor b) {
         b.slice(0, 0, 1).add_(1);
       }},
      {"out=",
       [](torch::Tensor b) {
         at::add_out(b, b, torch::ones({3}));
       }},
      {"foreach",
       [](torch::Tensor b) {
         at::_foreach_add_({b}, 1);
       }},
      {"data",
       [](torch::Tensor b) {
         b.variable_data().add_(1);
       }},
      {"index",
       [](torch::Tensor b) {
         b.index_put_({0}, b[0] + 1);
       }},
      {"batch_norm",
       [](torch::Tensor b) {
         at::batch_norm(
             torch::arange(12.f).view({4, 3}),
             {},
             {},
             b,
             torch::ones({3}),
             /*training=*/true,
             /*momentum=*/0.1,
             1e-5,
             false);
       }},
  };
  for (const auto& [name, write] : writes) {
    SCOPED_TRACE(name);
    expect_as_plain<Writing>(
        [write = write] { return Writing(write); }, torch::randn({4, 6}));
  }
}

// What something else changes between forward and backward.

TEST_P(SecondRun, FrozenParameterChangedInBetweenIsAnError) {
  nn::Linear f(3, 3);
  f->weight.set_requires_grad(false);
  memcnn::AdditiveCoupling coupling(f, zero());
  const torch::Tensor x = torch::randn({4, 6}).requires_grad_();
  torch::Tensor loss = run(GetParam(), coupling, x * 1.0).square().sum();
  {
    torch::NoGradGuard no_grad;
    f->weight.mul_(1.5);
  }
  if (GetParam() == Path::kBudget) { // kept, so autograd's own check
    EXPECT_THAT(
        [&] { loss.backward(); },
        ThrowsError<c10::Error>(HasSubstr("modified by an inplace")));
  } else {
    EXPECT_THAT(
        [&] { loss.backward(); },
        ThrowsError<c10::Error>(
            HasSubstr("the parameters and buffers that forward read to be "
                      "unchanged in backward, but got a change of 'weight'")));
  }
}

TEST_P(SecondRun, ParameterFrozenInBetweenGetsNoGradient) {
  nn::Linear f(3, 3);
  f->to(torch::kDouble);
  memcnn::AdditiveCoupling coupling(f, zero());
  const torch::Tensor x = leaf({4, 6});
  const auto gradient_of_x = [&](const torch::Tensor& y) {
    f->weight.set_requires_grad(false);
    y.square().sum().backward();
    f->weight.set_requires_grad(true);
    return std::exchange(x.mutable_grad(), {});
  };
  const torch::Tensor expected = gradient_of_x(coupling(x * 1.0));
  const torch::Tensor got = gradient_of_x(run(GetParam(), coupling, x * 1.0));
  EXPECT_LT(relative_error(got, expected), 1e-6);
  EXPECT_FALSE(f->weight.grad().defined());
  EXPECT_TRUE(f->bias.grad().defined());
}

TEST_P(SecondRun, ConstantBufferChangedInBetweenIsAnError) {
  if (GetParam() == Path::kBudget) {
    GTEST_SKIP() << "plain autograd of a kept block did not save the buffer";
  }
  nn::Functional f([](const torch::Tensor& x) { return x.square(); });
  const torch::Tensor level = f->register_buffer("level", torch::ones({3}));
  memcnn::AdditiveCoupling coupling(f, zero());
  torch::Tensor loss =
      run(GetParam(), coupling, leaf({4, 6}) * 1.0).square().sum();
  level.add_(1);
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(HasSubstr("got a change of 'level'")));
}

struct SavingImpl final : nn::Module {
  SavingImpl() {
    level = register_buffer("level", torch::ones({3}));
  }
  torch::Tensor forward(torch::Tensor x) {
    level.add_(1);
    return x.square() * level;
  }
  torch::Tensor level;
};
TORCH_MODULE(Saving);

TEST_P(SecondRun, SecondDerivativesStopWhereAWrittenBufferHasMovedOn) {
  if (GetParam() == Path::kBudget) {
    GTEST_SKIP() << "its backward has a graph of its own";
  }
  const auto second = [&](bool plain) {
    Saving f;
    memcnn::AdditiveCoupling coupling(f, zero());
    const torch::Tensor x = torch::randn({4, 6}).requires_grad_();
    const torch::Tensor h = x * 1.0;
    const torch::Tensor y = plain ? coupling(h) : run(GetParam(), coupling, h);
    const torch::Tensor first = torch::autograd::grad(
        {y.square().sum()}, {x}, {}, /*retain_graph=*/true, true)[0];
    f->level.add_(1);
    return torch::autograd::grad({first.square().sum()}, {x})[0];
  };
  const auto refuses =
      ThrowsError<c10::Error>(HasSubstr("modified by an "
                                        "inplace operation"));
  EXPECT_THAT([&] { second(/*plain=*/true); }, refuses);
  EXPECT_THAT([&] { second(/*plain=*/false); }, refuses);
}

// Norms.

/// Normalises by statistics that it then updates (batch renormalisation).
template <class Norm, class Options>
struct RenormImpl final : Norm {
  RenormImpl() : Norm(Options(3)) {}
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor old = this->running_var.clone();
    torch::Tensor y = (x - x.mean(0, /*keepdim=*/true)) / (old + 1e-5).sqrt();
    torch::NoGradGuard no_grad;
    if (this->is_training()) {
      this->running_var.mul_(0.9).add_(x.detach().var(0), 0.1);
    }
    return y;
  }
};

TEST_P(SecondRun, NormThatReadsItsStatisticsInTraining) {
  using Impl = RenormImpl<nn::BatchNorm1dImpl, nn::BatchNorm1dOptions>;
  expect_as_plain<nn::ModuleHolder<Impl>>(
      [] { return nn::ModuleHolder<Impl>(std::make_shared<Impl>()); },
      torch::randn({9, 6}));
}

/// Passes on to LibTorch's, and so writes the statistics by its kernel.
struct PassingNormImpl final : nn::BatchNorm1dImpl {
  PassingNormImpl() : BatchNorm1dImpl(nn::BatchNorm1dOptions(3)) {}
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor old = running_mean.clone();
    return BatchNorm1dImpl::forward(x) + old;
  }
};
TORCH_MODULE(PassingNorm);

TEST_P(SecondRun, NormThatPassesOnToLibTorchs) {
  expect_as_plain<PassingNorm>(
      [] { return PassingNorm(); }, torch::randn({9, 6}));
}

TEST_P(SecondRun, InstanceNormWithStatistics) {
  expect_as_plain<nn::InstanceNorm1d>(
      [] {
        return nn::InstanceNorm1d(
            nn::InstanceNorm1dOptions(3).track_running_stats(true));
      },
      torch::randn({3, 6, 7}));
}

TEST_P(SecondRun, CumulativeAverageOfBatchNorm) {
  expect_as_plain<nn::BatchNorm1d>(
      [] {
        return nn::BatchNorm1d(
            nn::BatchNorm1dOptions(3).momentum(std::nullopt));
      },
      torch::randn({9, 6}));
}

TEST_P(SecondRun, WhoReadsRunningStatisticsFindsThoseOfForward) {
  std::vector<torch::Tensor> seen;
  nn::BatchNorm1d norm(3);
  nn::Functional reader([&seen, norm](const torch::Tensor& x) {
    seen.push_back(norm->running_mean.clone());
    if (x.requires_grad()) {
      x.register_hook([&seen, norm](const torch::Tensor&) {
        seen.push_back(norm->running_mean.clone());
      });
    }
    return x * 1;
  });
  memcnn::AdditiveCoupling coupling(nn::Sequential(norm, reader), zero());
  run(GetParam(), coupling, leaf({9, 6}, torch::kFloat) * 1.0)
      .square()
      .sum()
      .backward();
  ASSERT_GE(seen.size(), 2u);
  for (const torch::Tensor& each : seen) {
    ASSERT_TRUE(each.defined());
    EXPECT_TRUE(each.equal(norm->running_mean));
  }
  EXPECT_EQ(norm->num_batches_tracked.item<int64_t>(), 1);
  EXPECT_TRUE(norm->options.track_running_stats());
  EXPECT_EQ(norm->options.momentum(), 0.1);
}

// Layouts.

TEST_P(SecondRun, OneImageInChannelsLastDrawsTheSameMask) {
  for (const int64_t batch : {1, 2}) {
    for (const auto format :
         {torch::MemoryFormat::ChannelsLast, torch::MemoryFormat::Contiguous}) {
      memcnn::AdditiveCoupling coupling(
          nn::Sequential(nn::Dropout(0.5)), zero());
      const torch::Tensor x =
          torch::randn({batch, 8, 6, 5}).contiguous(format).requires_grad_();
      const torch::Tensor y = run(GetParam(), coupling, x * 1.0);
      const torch::Tensor mask =
          (y - x).slice(1, 0, 4).div(x.slice(1, 4, 8)).detach();
      y.slice(1, 0, 4).sum().backward();
      EXPECT_LT(relative_error(x.grad().slice(1, 4, 8), mask), 1e-3)
          << "batch " << batch;
    }
  }
}

TEST_P(SecondRun, BranchSeesTheStridesOfForward) {
  const std::vector<std::pair<const char*, torch::Tensor>> inputs{
      {"one image",
       torch::randn({1, 4, 3, 2})
           .contiguous(torch::MemoryFormat::ChannelsLast)},
      {"one channel a half",
       torch::randn({3, 2, 3, 2})
           .contiguous(torch::MemoryFormat::ChannelsLast)},
      {"transposed", torch::randn({2, 3, 4, 3}).transpose(1, 2)},
      {"expanded", torch::randn({1, 4, 3, 2}).expand({3, 4, 3, 2})},
      {"strided", torch::randn({3, 8, 3, 2}).slice(1, 0, 8, 2)},
      {"sequence of one", torch::randn({1, 6}).t().contiguous().t()},
  };
  for (const auto& [name, x] : inputs) {
    SCOPED_TRACE(name);
    std::vector<std::vector<int64_t>> seen;
    const auto probe = [&seen](const torch::Tensor& t) {
      seen.push_back(t.strides().vec());
      return t.tanh(); // saves a tensor: runs again on every path
    };
    memcnn::AdditiveCoupling coupling{
        nn::Functional(probe), nn::Functional(probe)};
    const torch::Tensor input = x.detach().requires_grad_();
    run(GetParam(), coupling, input).square().sum().backward();
    if (GetParam() == Path::kBudget) { // runs once
      ASSERT_EQ(seen.size(), 2u);
      continue;
    }
    ASSERT_EQ(seen.size(), 4u); // F, G; then G, F or, from kept inputs, F, G
    const bool kept =
        GetParam() == Path::kKeepInput || is_checkpoint(GetParam());
    EXPECT_EQ(seen[2], seen[kept ? 0 : 1]);
    EXPECT_EQ(seen[3], seen[kept ? 1 : 0]);
  }
}

TEST(SecondRunOptions, MemoryFormatActsFromTheNextForwardOn) {
  torch::manual_seed(1);
  std::vector<std::vector<int64_t>> seen;
  const auto probe = [&seen](const torch::Tensor& t) {
    seen.push_back(t.strides().vec());
    return t * 0.5;
  };
  memcnn::ReversibleSequence sequence(
      memcnn::AdditiveCoupling{nn::Functional(probe), nn::Functional(probe)});
  const torch::Tensor x = leaf({2, 4, 3, 5});
  const torch::Tensor loss = sequence(x * 1.0).sum();
  sequence->options.memory_format(torch::MemoryFormat::ChannelsLast);
  loss.backward();
  ASSERT_EQ(seen.size(), 4u);
  EXPECT_EQ(seen[3], seen[0]);
  sequence(x * 1.0).sum().backward();
  EXPECT_NE(seen[4], seen[0]);
}

// Random numbers.

TEST_P(SecondRun, AnotherThreadThatDrawsInBetweenIsAnError) {
  if (GetParam() == Path::kBudget) {
    GTEST_SKIP() << "nothing runs again";
  }
  bool in_forward = true;
  nn::Functional once([&in_forward](const torch::Tensor& x) {
    if (in_forward) {
      std::thread([] { torch::rand({3}); }).join();
    }
    return torch::dropout(x, 0.5, /*train=*/true);
  });
  memcnn::AdditiveCoupling coupling(once, zero());
  torch::Tensor loss = run(GetParam(), coupling, leaf({4, 6}) * 1.0).sum();
  in_forward = false;
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(HasSubstr("another thread drew from the same "
                                        "default generator while it ran")));
}

TEST_P(SecondRun, AnotherThreadThatDrawsAfterwardsDoesNoHarm) {
  bool in_forward = true;
  nn::Functional f([&in_forward](const torch::Tensor& x) {
    torch::Tensor y = torch::dropout(x, 0.5, /*train=*/true);
    if (in_forward) {
      std::thread([] { torch::rand({3}); }).join();
    }
    return y;
  });
  memcnn::AdditiveCoupling coupling(f, zero());
  const torch::Tensor x = leaf({4, 6});
  const torch::Tensor y = run(GetParam(), coupling, x * 1.0);
  const torch::Tensor mask = ((y - x) / x.roll(3, 1)).slice(1, 0, 3).detach();
  in_forward = false;
  y.slice(1, 0, 3).sum().backward();
  EXPECT_LT(relative_error(x.grad().slice(1, 3, 6), mask), 1e-6);
}

TEST_P(SecondRun, ABranchThatDrawsNothingIsNotConcerned) {
  bool in_forward = true;
  nn::Functional f([&in_forward](const torch::Tensor& x) {
    if (in_forward) {
      std::thread([] { torch::rand({3}); }).join();
    }
    return x * 2;
  });
  memcnn::AdditiveCoupling coupling(f, zero());
  torch::Tensor loss = run(GetParam(), coupling, leaf({4, 6}) * 1.0).sum();
  in_forward = false;
  EXPECT_NO_THROW(loss.backward());
}

TEST(SecondRunThreads, TwoThreadsEitherStopOrHaveTheirOwnMasks) {
  std::atomic<int> wrong{0};
  const auto train = [&] {
    for (int step = 0; step < 1000; ++step) {
      memcnn::ReversibleSequence sequence(
          memcnn::AdditiveCoupling(nn::Sequential(nn::Dropout(0.5)), zero()));
      const torch::Tensor x = torch::ones({8, 64}).requires_grad_();
      const torch::Tensor y = sequence(x * 1.0);
      const torch::Tensor mask = (y - x).slice(1, 0, 32).detach();
      try {
        y.slice(1, 0, 32).sum().backward();
      } catch (const c10::Error&) {
        continue;
      }
      wrong += x.grad().slice(1, 32, 64).equal(mask) ? 0 : 1;
    }
  };
  std::thread other(train);
  train();
  other.join();
  EXPECT_EQ(wrong, 0);
}

// State that nobody can see.

/// Divides by how often it ran.
struct AnnealedImpl final : nn::Module {
  torch::Tensor forward(torch::Tensor x) {
    return x / ++runs;
  }
  int runs = 0;
};
TORCH_MODULE(Annealed);

TEST_P(SecondRun, DebugNamesTheBranchWithHiddenState) {
  if (GetParam() == Path::kBudget) {
    GTEST_SKIP() << "nothing runs again";
  }
  memcnn::AdditiveCoupling coupling(Annealed(), zero());
  torch::Tensor loss =
      run(GetParam(), coupling, leaf({4, 6}) * 1.0, /*debug=*/true).sum();
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(
          HasSubstr(
              // which runs the coupling as a whole
              is_checkpoint(GetParam()) ? "CouplingImpl" : "AnnealedImpl"),
          HasSubstr("to return in backward what it returned in forward")));
}

TEST_P(SecondRun, DebugNamesTheBranchWithAGeneratorOfItsOwn) {
  if (GetParam() == Path::kBudget) {
    GTEST_SKIP() << "nothing runs again";
  }
  auto generator = at::make_generator<at::CPUGeneratorImpl>(5);
  nn::Functional f([generator](const torch::Tensor& x) {
    return x * torch::rand(x.sizes(), generator, x.options());
  });
  memcnn::AdditiveCoupling coupling(f, zero());
  torch::Tensor loss =
      run(GetParam(), coupling, leaf({4, 6}) * 1.0, /*debug=*/true).sum();
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(HasSubstr("numbers of a generator of its own")));
}

TEST_P(SecondRun, DebugIsContentWithDropoutAndBatchNormAndChangesNothing) {
  const auto gradients = [&](bool debug) {
    torch::manual_seed(4);
    memcnn::AdditiveCoupling coupling(
        nn::Sequential(nn::Linear(3, 3), nn::BatchNorm1d(3), nn::Dropout(0.5)),
        Codes());
    const torch::Tensor x = torch::randn({9, 6}).requires_grad_();
    run(GetParam(), coupling, x * 1.0, debug).square().sum().backward();
    auto all = coupling->buffers();
    all.push_back(x.grad());
    for (const torch::Tensor& parameter : coupling->parameters()) {
      all.push_back(parameter);
      all.push_back(parameter.grad());
    }
    return all;
  };
  EXPECT_TRUE(all_equal(gradients(true), gradients(false)));
}

TEST(SecondRunDebug, FindsABlockThatIsNotInvertible) {
  memcnn::ReversibleSequence sequence(
      memcnn::ReversibleSequenceOptions().debug(true),
      WrongInverse([](const torch::Tensor& y) { return y / 3; }));
  torch::Tensor loss = sequence(leaf({4, 6}) * 1.0).sum();
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(
          HasSubstr("A block is not invertible"), HasSubstr("block 0")));
}

struct OnceImpl final : nn::Module {
  OnceImpl() {
    scale = register_parameter("scale", torch::ones({3}));
  }
  torch::Tensor forward(torch::Tensor x) {
    if (!ready) {
      torch::NoGradGuard no_grad;
      scale.mul_(3);
      ready = true;
    }
    return x * scale;
  }
  bool ready = false;
  torch::Tensor scale;
};
TORCH_MODULE(Once);

TEST(SecondRunWrites, DecidedByAPlainMemberAreAnError) {
  Once f;
  memcnn::ReversibleSequence sequence(memcnn::AdditiveCoupling(f, zero()));
  torch::Tensor loss = sequence(leaf({4, 6}, torch::kFloat) * 1.0).sum();
  EXPECT_THAT(
      [&] { loss.backward(); },
      ThrowsError<c10::Error>(HasSubstr("other writes of 'scale'")));
  EXPECT_EQ(f->scale[0].item<float>(), 3); // left as found
}

struct ThreadedImpl final : nn::Module {
  ThreadedImpl() {
    level = register_buffer("level", torch::ones({3}));
  }
  torch::Tensor forward(torch::Tensor x) {
    std::thread([this] { level.add_(1); }).join();
    return x * 2;
  }
  torch::Tensor level;
};
TORCH_MODULE(Threaded);

TEST(SecondRunWrites, OfAnotherThreadAreAnErrorInForward) {
  memcnn::ReversibleSequence sequence(
      memcnn::AdditiveCoupling(Threaded(), zero()));
  EXPECT_THAT(
      [&] {
        sequence(leaf({4, 6}) * 1.0);
      },
      ThrowsError<c10::Error>(HasSubstr("operators of this thread to write")));
}

TEST_P(SecondRun, ValueThatIsExpanded) {
  nn::Functional gate([](const torch::Tensor& x) {
    return x.mean(1, /*keepdim=*/true).expand_as(x);
  });
  memcnn::AdditiveCoupling coupling(gate, zero());
  const torch::Tensor x = torch::arange(8.).view({2, 4}).requires_grad_();
  const torch::Tensor weight = torch::arange(8.).view({2, 4});
  (run(GetParam(), coupling, x * 1.0) * weight).sum().backward();
  EXPECT_TRUE(x.grad().allclose(
      torch::tensor({{0., 1., 2.5, 3.5}, {4., 5., 10.5, 11.5}})
          .to(x.scalar_type())));
}

TEST_P(SecondRun, NormThatIsReachedTwice) {
  nn::BatchNorm1d norm(3);
  nn::Sequential f(norm, nn::Linear(3, 3), norm);
  memcnn::AdditiveCoupling coupling(f, zero());
  for (int step = 0; step < 2; ++step) {
    run(GetParam(), coupling, leaf({9, 6}, torch::kFloat) * 1.0)
        .sum()
        .backward();
  }
  EXPECT_EQ(norm->num_batches_tracked.item<int64_t>(), 4);
  EXPECT_TRUE(norm->options.track_running_stats());
  EXPECT_EQ(norm->options.momentum(), 0.1);
}

/// Two buffers in one memory, of which one is written.
struct OverlappingImpl final : nn::Module {
  OverlappingImpl() {
    all = register_buffer("all", torch::ones({2, 3}));
    row = register_buffer("row", all[0]);
  }
  torch::Tensor forward(torch::Tensor x) {
    torch::Tensor y = x * row.clone() + all.sum();
    torch::NoGradGuard no_grad;
    row.add_(1);
    return y;
  }
  torch::Tensor all;
  torch::Tensor row;
};
TORCH_MODULE(Overlapping);

TEST_P(SecondRun, BuffersThatOverlap) {
  expect_as_plain<Overlapping>(
      [] { return Overlapping(); }, torch::randn({4, 6}));
}

TEST_P(SecondRun, NormThatTrainsAndThenPredicts) {
  nn::BatchNorm1d norm(3);
  nn::Functional both([norm](const torch::Tensor& x) mutable {
    torch::Tensor y = norm(x);
    norm->eval();
    y = norm(y * 2);
    norm->train();
    return y;
  });
  both->register_module("norm", norm.ptr());
  memcnn::AdditiveCoupling coupling(both, zero());
  const auto gradient = [&](bool plain) {
    norm->reset_running_stats();
    torch::manual_seed(2);
    const torch::Tensor x = torch::randn({9, 6}).requires_grad_();
    const torch::Tensor h = x * 1.0;
    (plain ? coupling(h) : run(GetParam(), coupling, h))
        .square()
        .sum()
        .backward();
    return x.grad();
  };
  const torch::Tensor expected = gradient(true);
  EXPECT_LT(relative_error(gradient(false), expected), 1e-5);
}

TEST_P(SecondRun, TensorsThatAreReplacedAreAnError) {
  for (const bool in_forward : {true, false}) {
    SCOPED_TRACE(in_forward);
    nn::Functional f([](const torch::Tensor& x) { return x; });
    const torch::Tensor level = f->register_buffer("level", torch::ones({3}));
    const auto replace = [level] {
      level.set_data(level + 1);
    };
    nn::Functional moving([&](const torch::Tensor& x) {
      if (in_forward) {
        replace();
      }
      return x * level;
    });
    moving->register_buffer("level", level);
    memcnn::AdditiveCoupling coupling(moving, zero());
    const auto step = [&] {
      torch::Tensor loss = run(GetParam(), coupling, leaf({4, 6}) * 1.0).sum();
      if (!in_forward) {
        replace();
      }
      loss.backward();
    };
    if (GetParam() == Path::kBudget && !in_forward) {
      continue; // kept: autograd's own
    }
    EXPECT_THAT(
        step, ThrowsError<c10::Error>(HasSubstr("'level' to keep its memory")));
  }
}

TEST(SecondRunOfAnInput, ChangedInPlaceIsAnError) {
  nn::Sequential module(
      nn::Functional([](torch::Tensor x) { return x.sub_(0.5); }),
      nn::Linear(3, 3));
  EXPECT_THAT(
      [&] {
        memcnn::checkpoint(module, torch::randn({2, 3}));
      },
      ThrowsError<c10::Error>(HasSubstr("but got a change in place")));
}

TEST(SecondRunDebug, IsContentWithZeros) {
  memcnn::ReversibleSequence sequence{
      memcnn::ReversibleSequenceOptions().debug(true)};
  for (int i = 0; i < 3; ++i) {
    sequence->push_back(
        memcnn::AdditiveCoupling(nn::Linear(4, 4), nn::Linear(4, 4)));
  }
  torch::Tensor x = torch::randn({3, 8});
  x.narrow(1, 4, 4).zero_();
  EXPECT_NO_THROW(sequence(x.requires_grad_()).sum().backward());
}

// Modules with an inverse of their own.

TEST(SecondRunOfAMap, TheInverseSeesWhatForwardLeft) {
  torch::manual_seed(1);
  ActNorm norm;
  norm->scale.set_requires_grad(false); // what is trained may not move on
  memcnn::ReversibleSequence sequence(norm);
  const torch::Tensor x = torch::randn({50, 3}).requires_grad_();
  const torch::Tensor y = sequence(x * 1.0);
  {
    torch::NoGradGuard no_grad; // overwrites what the first run left
    norm->ready.fill_(false);
    sequence(torch::randn({50, 3}) * 7);
  }
  y.square().sum().backward();
  const torch::Tensor scale = 1 / x.detach().std(0, true, true);
  EXPECT_LT(relative_error(x.grad(), 2 * x.detach() * scale * scale), 1e-5);
}

/// Doubles, and undoes that in another layout; tells the strides that it sees.
struct DoublingImpl final : nn::Module {
  torch::Tensor forward(torch::Tensor x) {
    seen.push_back(x.strides().vec());
    return x * 2;
  }
  torch::Tensor inverse(torch::Tensor y) {
    return (y / 2).clone(torch::MemoryFormat::Contiguous);
  }
  std::vector<std::vector<int64_t>> seen;
};
TORCH_MODULE(Doubling);

TEST(SecondRunOfAMap, ItsArgumentHasTheStridesOfForward) {
  const std::vector<torch::Tensor> inputs{
      torch::randn({1, 4, 3, 2}).contiguous(torch::MemoryFormat::ChannelsLast),
      torch::randn({4, 3}).t(),
      torch::randn({1, 3}).expand({4, 3}),
      torch::randn({4, 6}).slice(1, 0, 6, 2)};
  for (const torch::Tensor& input : inputs) {
    Doubling block;
    memcnn::ReversibleSequence sequence(block);
    const torch::Tensor x = input.detach().requires_grad_();
    sequence(x).square().sum().backward();
    ASSERT_EQ(block->seen.size(), 2u);
    EXPECT_EQ(block->seen[1], block->seen[0]);
    EXPECT_LT(relative_error(x.grad(), 8 * x), 1e-6);
  }
}

TEST(SecondRunOfAMap, TheCheckerLeavesParametersAsItFindsThem) {
  ActNorm norm;
  const auto version = norm->scale._version();
  EXPECT_TRUE(memcnn::is_invertible_module(norm, {5, 3}));
  EXPECT_TRUE(norm->scale.equal(torch::ones({1, 3})));
  EXPECT_EQ(norm->scale._version(), version);
  EXPECT_FALSE(norm->ready.item<bool>());
}

} // namespace
} // namespace memcnn_test
