// SPDX-License-Identifier: MIT
//
// What saving memory costs the host, a branch: on tensors so small that nothing
// else takes time. Says microseconds; under valgrind's callgrind, which counts
// instructions, it dumps the counts of one step of each engine.

#include <memcnn/memcnn.h>
#include <torch/torch.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <ctime>
#include <string>
#include <vector>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_START_INSTRUMENTATION
#define CALLGRIND_STOP_INSTRUMENTATION
#define CALLGRIND_DUMP_STATS_AT(name)
#endif

namespace {

using torch::Tensor;
using torch::nn::Sequential;
using Coupling = memcnn::AdditiveCoupling<Sequential>;

constexpr int kBlocks = 16;
constexpr int kBranches = 2 * kBlocks;

/// y = w * x: the cheapest layer with a parameter, and one of a user's own.
struct ScaleImpl : torch::nn::Module {
  ScaleImpl() : weight(register_parameter("weight", torch::ones({2, 1, 1}))) {}
  Tensor forward(const Tensor& x) {
    return x * weight;
  }
  Tensor weight;
};
TORCH_MODULE(Scale);

/// Six layers, of which "light" has scales, "real" what residual networks have.
Sequential branch(const std::string& kind) {
  Sequential layers;
  for (int i = 0; i < 6 && kind == "light"; ++i) {
    layers->push_back(Scale());
  }
  for (int i = 0; i < 2 && kind == "real"; ++i) {
    layers->push_back(torch::nn::BatchNorm2d(2));
    layers->push_back(torch::nn::ReLU());
    layers->push_back(torch::nn::Conv2d(
        torch::nn::Conv2dOptions(2, 2, 3).padding(1).bias(false)));
  }
  return layers;
}

/// One chain of couplings under every engine.
class Chain {
 public:
  explicit Chain(const std::string& kind) {
    for (int i = 0; i < kBlocks; ++i) {
      blocks_.emplace_back(branch(kind), branch(kind));
      wrappers_.emplace_back(blocks_.back());
      sequence_->push_back(blocks_.back());
    }
  }

  Tensor forward(const std::string& engine, Tensor x) {
    if (engine == "sequence") {
      return sequence_->forward(x);
    }
    for (size_t i = 0; i < kBlocks; ++i) {
      if (engine == "wrapper") {
        x = wrappers_[i]->forward(x);
      } else if (engine == "plain" || engine == "plain-nograd") {
        x = blocks_[i]->forward(x);
      } else {
        x = checkpointed(blocks_[i], engine == "checkpoint", x);
      }
    }
    return x;
  }

  std::vector<Tensor> parameters() const {
    return sequence_->parameters();
  }

 private:
  static Tensor
  checkpointed(const Coupling& block, bool early_stop, const Tensor& x) {
    const auto options = memcnn::CheckpointOptions().early_stop(early_stop);
    const std::vector<Tensor> halves = x.chunk(2, 1);
    const Tensor y0 =
        halves[0] + memcnn::checkpoint(options, block->f, halves[1]);
    const Tensor y1 = halves[1] + memcnn::checkpoint(options, block->g, y0);
    return torch::cat({y0, y1}, 1);
  }

  std::vector<Coupling> blocks_;
  std::vector<memcnn::InvertibleModuleWrapper<Coupling>> wrappers_;
  memcnn::ReversibleSequence sequence_;
};

void step(Chain& chain, const std::string& engine) {
  for (Tensor& parameter : chain.parameters()) {
    parameter.mutable_grad() = Tensor();
  }
  const bool with_graph = engine != "plain-nograd";
  const torch::AutoGradMode mode(with_graph);
  const Tensor x = torch::ones({2, 4, 2, 2}).requires_grad_(with_graph) * 1;
  const Tensor y = chain.forward(engine, x);
  if (with_graph) {
    y.sum().backward();
  }
}

/// Processor time: what others do on this machine is not in it.
double microseconds() {
  return 1e6 * static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

/// Microseconds a branch, the 10 % quantile: others' noise only adds.
double cost(Chain& chain, const std::string& engine, int steps) {
  for (int i = 0; i < 5; ++i) {
    step(chain, engine);
  }
  std::vector<double> costs;
  for (int i = 0; i < steps; ++i) {
    const double start = microseconds();
    step(chain, engine);
    costs.push_back((microseconds() - start) / kBranches);
  }
  std::sort(costs.begin(), costs.end());
  return costs[costs.size() / 10];
}

/// One step for callgrind, in a dump of that name.
void count(Chain& chain, const std::string& engine, const std::string& name) {
  CALLGRIND_START_INSTRUMENTATION;
  step(chain, engine);
  CALLGRIND_DUMP_STATS_AT(name.c_str());
  CALLGRIND_STOP_INSTRUMENTATION;
  static_cast<void>(name); // without valgrind's header
}

} // namespace

int main(int argc, char** argv) {
  int steps = 200;
  std::vector<std::string> engines = {
      "plain-nograd", "plain", "sequence", "wrapper", "checkpoint", "whole"};
  std::vector<std::string> kinds = {"light", "real"};
  CLI::App app("The host's share, in microseconds a branch");
  app.add_option("--steps", steps, "Timed steps")->check(CLI::PositiveNumber);
  app.add_option("--engine", engines)->check(CLI::IsMember(engines));
  app.add_option("--branch", kinds)->check(CLI::IsMember(kinds));
  CLI11_PARSE(app, argc, argv);

  torch::set_num_threads(1);
  // oneDNN takes hundreds of microseconds for a convolution of four pixels.
  torch::globalContext().setUserEnabledMkldnn(false);
  for (const std::string& kind : kinds) {
    torch::manual_seed(0);
    Chain chain(kind);
    for (const std::string& engine : engines) {
      fmt::print(
          "{:6} {:13} {:7.1f}\n", kind, engine, cost(chain, engine, steps));
      count(chain, engine, kind + " " + engine);
    }
  }
}
